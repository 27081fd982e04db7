"""The launches in docs/distributed.md: bash and YAML that parse, options that torchrun and fastflow have."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from fastflow import cli
from fastflow.engine import load_settings

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    assert found
    return found


def manifests():
    yaml = pytest.importorskip("yaml")
    found = {document["kind"]: document for text in blocks("yaml") for document in yaml.safe_load_all(text)}
    assert found.keys() == {"Service", "Job"}
    return found


def container():
    (one,) = manifests()["Job"]["spec"]["template"]["spec"]["containers"]
    return one


def scripts():
    return [*blocks("bash"), container()["args"][0]]


def launches():
    """The arguments of every torchrun, parsed by torchrun's own parser, and of the fastflow behind it."""
    from torch.distributed.run import get_args_parser

    found = []
    for script in scripts():
        joined = script.replace("\\\n", " ")
        (line,) = [line for line in joined.splitlines() if "torchrun" in line and not line.startswith("#")]
        words = shlex.split(line.rstrip("& ").replace("$", "_"))
        found.append(get_args_parser().parse_args(words[words.index("torchrun") + 1:]))
    return found


def test_scripts_parse():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    for script in scripts():
        done = subprocess.run([bash, "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    broken = subprocess.run([bash, "-n"], input=scripts()[0] + "if", capture_output=True, text=True, check=False)
    assert broken.returncode != 0


def test_torchrun_and_fastflow_have_the_options():
    found = launches()
    assert len(found) == 3
    for launch in found:
        assert launch.module and launch.training_script == "fastflow.cli"
        train = cli.parser().parse_args(launch.training_script_args)
        assert train.command is cli.run_train and train.resume == "auto" and train.out
        assert train.recipe == "glow-photos" and launch.shutdown_timeout == 240
    assert [launch.standalone for launch in found] == [True, False, False]


def test_every_number_of_processes_shares_the_batch_out():
    nodes = re.search(r"--nodes=(\d+)", next(s for s in blocks("bash") if "#SBATCH" in s))[1]
    for launch in launches():
        least, _, most = ("1" if launch.standalone else launch.nnodes.replace("_SLURM_NNODES", nodes)).partition(":")
        train = cli.parser().parse_args(launch.training_script_args)
        settings = load_settings(train.recipe, train.overrides).train
        for n in range(int(least), int(most or least) + 1):
            assert settings.batch_size % (n * int(launch.nproc_per_node) * settings.accumulate) == 0, (launch.nnodes, n)


def test_the_slurm_script_leaves_time_to_save():
    script = next(s for s in blocks("bash") if "#SBATCH" in s)
    seconds = int(re.search(r"--signal=B:USR1@(\d+)", script)[1])
    assert seconds > launches()[1].shutdown_timeout and script.startswith("#!/bin/bash\n#SBATCH")
    assert int(re.search(r"--gpus-per-node=(\d+)", script)[1]) == int(launches()[1].nproc_per_node)
    assert int(re.search(r"--ntasks-per-node=(\d+)", script)[1]) == 1


def test_the_manifests_fit_together():
    service, job = manifests()["Service"], manifests()["Job"]
    spec, name = job["spec"], job["metadata"]["name"]
    pod, launch = spec["template"]["spec"], launches()[2]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert launch.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
    assert int(launch.nnodes.rpartition(":")[2]) == spec["parallelism"]
    assert int(launch.nproc_per_node) == container()["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > launch.shutdown_timeout
    mounts = {mount["name"] for mount in container()["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
