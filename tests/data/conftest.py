"""Where the libraries that hold the images are missing, there is nothing to test."""

import importlib.util

collect_ignore = []
if any(importlib.util.find_spec(name) is None for name in ("sklearn", "skimage", "PIL")):
    collect_ignore = ["test_images.py", "test_photos.py"]
