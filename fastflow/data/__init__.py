"""Real images that ship inside well-kept libraries: nothing is downloaded.

========= ====================================================== ============== ======
name      what                                                   image shape    levels
========= ====================================================== ============== ======
photos    crops of the photographs in scikit-learn, scikit-image (3, 32, 32)    256
digits    scikit-learn's handwritten digits                      (1, 8, 8)      17
========= ====================================================== ============== ======

``fastflow.data.toy2d`` holds two-dimensional densities known exactly.
"""

from fastflow.data.images import DATASETS, ImageData, load

__all__ = ["DATASETS", "ImageData", "load"]
