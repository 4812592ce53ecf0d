"""All that can be known of params.yaml before anything is trained."""

from stages.merging.kernels import find_kernel
from stages.project.params import Params, load_params


def load_checked() -> Params:
    """Read params.yaml and check the merge too, which takes torch and would else be told after all training.

    Raises:
        MistakeError: for the first mistake found.
    """
    params = load_params()
    find_kernel(params.merge)
    return params
