"""`strata export sign`: a signature that tells whether a file was altered since (OpenSSF model signing).

The signature is a Sigstore bundle over the hashes of all files, which any tool of that standard checks. Offline, with a
key of one's own; the library is the extra `sign`.
"""

import ast
from pathlib import Path
from typing import Any

from stages.errors import MistakeError, first_line
from stages.files import MERGED, replacing

FILE = "model.sig"
# `hub` writes the model's name into the card and the notebook, which people edit; `hf download` leaves .cache.
LEFT_OUT = (FILE, "README.md", "notebook.ipynb", ".cache")
MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem"


def main(folder: Path, key: Path) -> None:
    """Write FOLDER/model.sig.

    Raises:
        MistakeError: there is no such folder, it is merged/, the key is none, or the extra is not installed.
    """
    library = load_library()
    if not folder.is_dir():
        raise MistakeError(f"{folder} is no folder to sign; run `strata export model`, or name another")
    if folder.resolve() == MERGED.resolve():
        raise MistakeError(f"{MERGED} stays as the merge wrote it; run `strata export model`, and sign that")
    hashing = library.hashing.Config().set_ignored_paths(paths=LEFT_OUT)
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # the library's, and that of whoever reads the key
        raise MistakeError(
            f"--key {key} is no private key that signs ({first_line(error)}); make one with `{MAKE}`"
        ) from None
    with replacing(folder / FILE) as target:
        signer.set_hashing_config(hashing).sign(folder, target)
    print(f"{folder / FILE}; `strata verify {folder} --key PUBLIC` checks it (openssl ec -in {key} -pubout)")


def check(folder: Path, signature: Path, key: Path) -> list[str]:
    """A sentence where files are not those that were signed, or not with the key; none where all is well.

    Args:
        folder: of the model.
        signature: the bundle.
        key: the signer's public key, PEM.

    Raises:
        MistakeError: the signature or the key is none, or the extra is not installed.
    """
    library = load_library()
    if not signature.is_file():
        raise MistakeError(f"{signature} is not there; name the signature with --signature")
    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:  # see above
        raise MistakeError(f"--key {key} is no public key ({first_line(error)}); give the signer's, as PEM") from None
    # What was left out is in the signature. A snapshot in the hub's cache is made of links, so they are followed.
    verifier.set_hashing_config(library.hashing.Config().set_allow_symlinks(True))
    try:
        verifier.verify(folder, signature)
    except Exception as error:  # a key or file that is another one, and what is no signature at all
        return [f"{folder} is not as {signature} has it, by {key}: {differences(error)}"]
    return []


def differences(error: Exception) -> str:
    """What the library says of files that differ, without their hashes, or of a signature that is none."""
    told = str(error).removeprefix("Signature mismatch: ")
    if not told.startswith("["):
        return first_line(error)
    return "; ".join(each.partition(": Expected ")[0] for each in ast.literal_eval(told))


def load_library() -> Any:
    """The library's modules."""
    try:
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError:
        raise MistakeError("signatures need the extra sign; run uv sync --extra sign") from None
    return model_signing
