"""FP4 linears for torch.compile, chosen by selector; see README.md.

What `__init__.pyi` names is imported when it is first used, for torch alone takes a second.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
