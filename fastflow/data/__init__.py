"""Data by name or by path: nothing is downloaded.

Real images that ship inside well-kept libraries:

========= ====================================================== ============== ======
name      what                                                   image shape    levels
========= ====================================================== ============== ======
photos    crops of the photographs in scikit-learn, scikit-image (3, 32, 32)    256
digits    scikit-learn's handwritten digits                      (1, 8, 8)      17
========= ====================================================== ============== ======

and tables, ``breast-cancer`` of scikit-learn (569 rows of 30 measurements) and ``patches`` (8x8 patches of the
photographs, 63 numbers each, made as those of BSDS300).

:func:`load` also reads CIFAR-10, downsampled ImageNet, folders of pictures, tables and Hugging Face datasets at a path.
``fastflow.data.toy2d`` holds two-dimensional densities known exactly.
"""

from fastflow.data.files import DataFileError
from fastflow.data.images import ImageData
from fastflow.data.sources import DATASETS, FORMATS, OPTIONS, TABLES, load
from fastflow.data.tables import TableData

__all__ = ["DATASETS", "FORMATS", "OPTIONS", "TABLES", "DataFileError", "ImageData", "TableData", "load"]
