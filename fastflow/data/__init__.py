"""Data by name or by path: nothing is downloaded.

Real images that ship inside well-kept libraries:

========= ====================================================== ============== ======
name      what                                                   image shape    levels
========= ====================================================== ============== ======
photos    crops of the photographs in scikit-learn, scikit-image (3, 32, 32)    256
digits    scikit-learn's handwritten digits                      (1, 8, 8)      17
========= ====================================================== ============== ======

:func:`load` also reads CIFAR-10, downsampled ImageNet, folders of pictures, tables and Hugging Face datasets at a path.
``fastflow.data.toy2d`` holds two-dimensional densities known exactly.
"""

from fastflow.data.files import DataFileError
from fastflow.data.images import ImageData
from fastflow.data.sources import DATASETS, FORMATS, load
from fastflow.data.tables import TableData

__all__ = ["DATASETS", "FORMATS", "DataFileError", "ImageData", "TableData", "load"]
