"Transfer learning for medical images. The names below load their module when they are first used."
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_HOME = {  # name -> the module that holds it
    "MedxferError": "core", "seed_everything": "core", "show": "core",
    "read_image": "images",
    "load": "datasets", "list_datasets": "datasets", "ImageSet": "imageset",
    "create_model": "backbones", "list_models": "backbones",
    "score": "metrics",
    "transfer": "strategies", "STRATEGIES": "transfer",
    "explain": "explain",
    "compare": "compare",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__(): return sorted(__all__)


class _Package(ModuleType):
    "Importing the module `transfer` must not hide the function `transfer`: such a name stays unset, so that `__getattr__` finds it at home."
    def __setattr__(self, name, value):
        if not (isinstance(value, ModuleType) and name in _HOME): super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
