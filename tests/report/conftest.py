"""Reports say of a strategy what its plan says."""

import prism.sampling  # noqa: F401
