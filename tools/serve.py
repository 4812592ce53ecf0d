"""The base, every stage and the merged model under OpenAI's interface on this machine: `strata serve`.

The server is transformers' own (`transformers serve`); what it may load is what params.yaml names.
"""

import socket
from argparse import ArgumentParser
from functools import cache
from typing import Any

from stages.errors import MistakeError, first_line
from stages.models.loading import load_tokenizer
from stages.project.params import load_params
from tools.models import load, names_of
from tools.terminal import positive

HOST = "127.0.0.1"


def add_arguments(parser: ArgumentParser) -> None:
    """Where it listens."""
    parser.add_argument("--port", type=positive, default=8000, help="of 127.0.0.1; 8000")


def main(port: int) -> None:
    """Answer until it is interrupted.

    Raises:
        MistakeError: the extra `serve` is not installed, there is no base yet, or the port is taken.
    """
    settings = load_params()
    names = names_of(settings)
    try:
        import uvicorn
        from fastapi import HTTPException, Request
        from fastapi.responses import JSONResponse
        from transformers.cli.serving import chat_completion, completion, response, server, systemone, transcription
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.utils import GenerationState
    except ImportError:
        raise MistakeError("strata serve needs the extra of that name; run uv sync --extra serve") from None
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise MistakeError(f"port {port} of {HOST} cannot be had ({error}); name another by --port") from None

    class Models(ModelManager):
        """Loads what params.yaml names, and nothing else."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            if model_id not in names:
                raise HTTPException(404, f"there is no model {model_id!r}; take {', '.join(names)}")
            return model_id

        def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
            return load_tokenizer()

        def _load_model(self, model_id_and_revision: str, *_: Any, **more: Any) -> Any:
            try:
                return load(settings, model_id_and_revision)
            except MistakeError as mistake:
                raise HTTPException(409, str(mistake)) from None

        @staticmethod
        @cache
        def get_gen_models(cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "owned_by": "strata", "created": 0} for name in names]

    models, state = Models(), GenerationState(continuous_batching=False, compile=False)
    app = server.build_server(
        models,
        chat_completion.ChatCompletionHandler(models, state),
        completion.CompletionHandler(models, state),
        response.ResponseHandler(models, state),
        transcription.TranscriptionHandler(models, state),
        systemone.SystemOneHandler(models, state),
        state,
    )

    @app.exception_handler(HTTPException)
    def tell(_: Request, error: HTTPException) -> JSONResponse:
        """As OpenAI's clients read it."""
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    @app.exception_handler(ValueError)
    def refuse(_: Request, error: ValueError) -> JSONResponse:
        """What transformers cannot do with a request, such as a chat where the base has no chat template."""
        return JSONResponse({"error": {"message": first_line(error)}}, 400)

    print(f"{', '.join(names)} at http://{HOST}:{port}/v1; Ctrl-C ends", flush=True)
    uvicorn.run(app, host=HOST, port=port, log_level="warning")
