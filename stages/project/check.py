"""All that can be known of params.yaml before anything is trained."""

from stages.errors import MistakeError
from stages.merging.kernels import find_kernel
from stages.project.params import PARAMS, Params, load_params

TRACKED = ("selections", "warn")  # sections with a default that dvc.yaml names all the same


def load_checked() -> Params:
    """Read params.yaml and check the merge too, which takes torch and would else be told after all training.

    Raises:
        MistakeError: for the first mistake found.
    """
    params = load_params()
    find_kernel(params.merge)
    for section in TRACKED:
        if section not in params.model_fields_set:
            raise MistakeError(f"{PARAMS}: {section} is missing, and DVC asks for it; write {section}: {{}}")
    return params
