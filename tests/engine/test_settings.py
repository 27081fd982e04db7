import pytest
from data_files import pictures

from fastflow.engine import SettingsError, load_settings
from fastflow.engine.datasets import load_data
from fastflow.engine.settings import described, differences, from_dict, recipes

SHIPPED = {"glow-photos", "glow-digits", "vae-digits"}


def test_the_shipped_recipes_are_valid_and_described():
    assert set(recipes()) >= SHIPPED
    for name, description in recipes().items():
        settings = load_settings(name)
        assert settings.description == description and len(description) > 20
        assert from_dict(settings.model_dump()) == settings


def test_overrides_are_read_as_toml_and_otherwise_as_text():
    settings = load_settings("glow-photos", ["train.steps=12", "train.learning_rate=1e-4", "data.name=digits",
                                             'train.device="cpu"', "model.n_steps = 2", "train.steps=13"])
    assert settings.train.steps == 13 and settings.train.learning_rate == 1e-4 and settings.data.name == "digits"
    assert settings.train.device == "cpu" and settings.model.n_steps == 2


@pytest.mark.parametrize("override, message", [
    ("train.stepz=3", "train.stepz: unknown setting"),
    ("trian.steps=3", "trian: unknown setting"),
    ("model.n_stepz=3", "model.n_stepz: unknown setting"),
    ("train.steps=abc", "train.steps: input should be a valid integer, got 'abc'"),
    ('train.steps="3"', "train.steps: input should be a valid integer, got '3'"),
    ("train.steps=1.0", "train.steps: input should be a valid integer, got 1.0"),
    ("train.steps=true", "train.steps: input should be a valid integer, got True"),
    ("train.steps=-1", "train.steps: input should be greater than or equal to 0, got -1"),
    ("train.steps=99999999999999999999", "train.steps: "),
    ("train.threads=100000", "train.threads: input should be less than or equal to 4096, got 100000"),
    ("train.learning_rate=nan", "train.learning_rate: input should be a finite number"),
    ("train.learning_rate=0", "train.learning_rate: input should be greater than 0"),
    ("train.learning_rate=fast", "train.learning_rate: input should be a valid number, got 'fast'"),
    ("train.ema_decay=1", "train.ema_decay: input should be less than 1"),
    ("data.name=cats", "data.name: input should be 'digits', 'photos', 'breast-cancer' or 'patches', got 'cats'"),
    ("model.kind=gan", "model.kind: expected one of glow, jet, "),
    ("train.steps=3\n[x]", "train.steps: input should be a valid integer"),
    ("train.steps=__import__('os').system('true')", "train.steps: input should be a valid integer"),
    ("description.x=3", "--set: description is not a section"),
    ("train.steps", "--set: expected section.key=value, got 'train.steps'"),
    ("steps=3", "--set: expected section.key=value"),
    ("a.b.c=3", "--set: expected section.key=value"),
    ("=3", "--set: expected section.key=value"),
    (".=", "--set: expected section.key=value"),
])
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(SettingsError) as caught:
        load_settings("glow-photos", [override])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_every_setting_is_described():
    rows = {name: (default, what) for name, default, what in described()}
    assert all(len(what) > 5 for _, what in rows.values())
    assert rows["train.steps"][0] == "needed" and rows["train.batch_size"][0] == "32"
    assert rows["model (glow).n_steps"][0] == "8" and rows["model (maf).activation"][1].endswith(": relu, tanh")
    assert "table" in rows["data.format"][1] and "patches" in rows["data.name"][1] and "sweep.beta" in rows
    for name in recipes():  # nothing of a recipe is left out
        settings = load_settings(name)
        named = {f"model ({settings.model.kind}).{key}" for key in settings.model.model_dump() if key != "kind"}
        named |= {f"{section}.{key}" for section in ("data", "train", "sample")
                  for key in getattr(settings, section).model_dump()}
        assert named <= rows.keys()


def test_a_path_takes_the_place_of_the_recipes_own_data():
    settings = load_settings("glow-photos", ["data.path=mine", "data.format=folder", "data.size=32"])
    assert settings.data.name is None and settings.data.path == "mine"
    moved = load_settings("glow-photos", ["data.path=moved", "data.format=folder", "data.size=32"])
    assert differences(settings, moved) == []


def test_a_folder_of_ones_own_may_have_the_name_of_data_that_ship(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "digits", map(str, range(10)))
    found = load_data(load_settings("glow-photos", ["data.path=digits"]))
    assert found.event_shape == (3, 4, 6) and found.n_bins == 256
    with pytest.raises(SettingsError, match="^data.path: there is nothing at ./photos/; say where"):
        load_data(load_settings("glow-photos", ["data.path=./photos/"]))


def test_a_recipe_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[data]\nname = "digits"\n[model]\nkind = "vae"\n[train]\nsteps = 5\n')
    assert load_settings(str(path)).model.latent_features == 16
    path.write_text('[data]\nname = "digits"\n[model]\nkind = "vae"\n')
    with pytest.raises(SettingsError, match="^train: missing$"):
        load_settings(str(path))
    path.write_text("steps 5")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_settings(str(path))
    path.write_bytes(b"a = \"\xff\"")
    with pytest.raises(SettingsError, match="is not TOML"):
        load_settings(str(path))
    with open(path, "wb") as file:
        file.truncate(1 << 21)
    with pytest.raises(SettingsError, match="larger than"):
        load_settings(str(path))
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(str(tmp_path / "no.toml"))


@pytest.mark.parametrize("name", ["../recipes/glow-photos", "glow-photo", "", "/etc/passwd", "glow-photos.toml/"])
def test_an_unknown_recipe_is_refused(name):
    with pytest.raises(SettingsError, match="recipe: expected one of .*glow-photos"):
        load_settings(name)


def test_what_may_change_on_resume():
    old = load_settings("glow-digits")
    same = ["train.steps=99999", "train.eval_every=1", "train.max_seconds=0", "sample.count=4", "train.log_every=3"]
    assert differences(old, load_settings("glow-digits", same)) == []
    assert differences(old, load_settings("glow-digits", ["train.seed=4"])) == ["train.seed"]
    assert differences(old, load_settings("glow-digits", ["model.n_steps=4"])) == ["model.n_steps"]
    assert "model.kind" in differences(old, load_settings("vae-digits"))
