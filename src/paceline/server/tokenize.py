"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM's, and Anthropic's `POST /v1/messages/count_tokens`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paceline.engines.base import Tokenizer
from paceline.server.errors import ApiError, bad, error_response, route
from paceline.server.fields import ChatCompletionRequest, ChatMessage, Decoder, TokenId, Tool, too_deep
from paceline.server.http import read_body, unless_gone
from paceline.server.messages import CountRequest, MessagesFormat
from paceline.server.prompts import PromptMaker, token_ids
from paceline.server.requests import Models, Preparer, model_of


class TokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of `/tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True):
    """The body of `/detokenize`."""

    tokens: list[TokenId]
    model: str | None = None


Work = Callable[[bytes, threading.Event], bytes]
"""From a body to an answer, as JSON: either may be long."""


def works(models: Models) -> dict[str, Work]:
    """What each path does with a body. Raises ApiError."""

    def work(kind: type[Struct], make: Callable[[Models, Any, threading.Event], dict[str, Any]]) -> Work:
        decoder: Decoder[Any] = Decoder(kind)

        def done(body: bytes, cancelled: threading.Event) -> bytes:
            try:
                return msgspec.json.encode(make(models, decoder.decode(body), cancelled))
            except RecursionError:
                raise too_deep() from None

        return done

    return {
        "/tokenize": work(TokenizeRequest, _tokenize),
        "/detokenize": work(DetokenizeRequest, _detokenize),
        "/v1/messages/count_tokens": work(CountRequest, _count),
    }


def tokenize_routes(preparer: Preparer, max_body_bytes: int) -> list[Route]:
    """All routes. None of the work is done on the event loop."""
    models, known = preparer.models, works(preparer.models)

    async def whole(request: Request) -> Response:
        path = request.url.path
        body = await read_body(request.receive, request.headers, max_body_bytes)
        made = await unless_gone(request.receive, preparer.elsewhere(path, known[path], len(body), body))
        return Response(made, media_type="application/json")

    async def count(request: Request) -> Response:
        try:
            return await whole(request)
        except ApiError as error:
            return error_response(error, request.headers.get("x-request-id"), MessagesFormat.error_body(error))

    return [
        route("/tokenizer_info", "GET", lambda _: JSONResponse(_info(models))),
        route("/tokenize", "POST", whole),
        route("/detokenize", "POST", whole),
        route("/v1/messages/count_tokens", "POST", count),
    ]


def _info(models: Models) -> dict[str, Any]:
    """What clients that tokenize here want to know: the special tokens by their names, and the chat template."""
    tokenizer = models.tokenizer
    special = {name: text or None for name, text in getattr(tokenizer, "special_tokens", {}).items()}
    about = {"tokenizer_class": type(tokenizer).__name__, "model_max_length": models.limit}
    return about | {"bos_token": None, "eos_token": None} | special | {"chat_template": tokenizer.chat_template}


def _tokenize(models: Models, request: TokenizeRequest, cancelled: threading.Event) -> dict[str, Any]:
    tokenizer = models.tokenizer
    model_of(request.model, models)
    if (request.prompt is None) == (request.messages is None):
        raise bad("prompt", "is required, or messages in its place")
    maker = PromptMaker(tokenizer, models.limit, cancelled)
    if request.messages is None:
        assert request.prompt is not None
        special = request.add_special_tokens is not False
        ids = maker.tokens(
            # A character may be as many tokens as it has bytes.
            request.prompt,
            models.limit + 4 * len(request.prompt),
            "prompt",
            special=special,
            parse=True,
        )
    else:
        chat = ChatCompletionRequest(
            messages=request.messages, add_generation_prompt=request.add_generation_prompt, tools=request.tools,
            continue_final_message=request.continue_final_message, chat_template_kwargs=request.chat_template_kwargs,
            add_special_tokens=request.add_special_tokens,
        )  # fmt: skip
        ids = maker.chat(chat).token_ids
    said = {"count": len(ids), "max_model_len": models.limit, "tokens": ids}
    return said | {"token_strs": [_text(tokenizer, token) for token in ids] if request.return_token_strs else None}


def _count(models: Models, request: CountRequest, cancelled: threading.Event) -> dict[str, Any]:
    model_of(request.model, models)
    maker = PromptMaker(models.tokenizer, models.limit, cancelled)
    return {"input_tokens": len(maker.chat(request.chat()).token_ids)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token])


def _detokenize(models: Models, request: DetokenizeRequest, cancelled: threading.Event) -> dict[str, Any]:
    model_of(request.model, models)
    return {"prompt": models.tokenizer.decode(token_ids("tokens", request.tokens, models.tokenizer.vocabulary_size))}
