"""Bytes of stream sockets and of HTTP: collectives, the rendezvous, the watchdog's answers, request bodies."""

from __future__ import annotations

import json
import random
import socket
from typing import Any

import msgspec
import numpy as np
from starlette.datastructures import Headers

from paceline.core import codec
from paceline.core.requests import AddRequest
from paceline.engines.base import EngineSettings
from paceline.engines.group import EpochEnded
from paceline.engines.timed import TimedEngine
from paceline.net.collective import SocketGroup
from paceline.net.node import ANSWER, QUESTION, Here, WhereIs, answer_to
from paceline.server.errors import ApiError
from paceline.server.fields import ChatCompletionRequest, CompletionRequest, Decoder
from paceline.server.requests import Models, prepare
from paceline.vllm.watchdog import Watchdog
from tests.fuzz.target import Target, said_well

NOTHING: Any = np.zeros(3, np.float32)
PIPE_BYTES = 60_000


class Collectives(Target):
    """A member of a group of two, whose peer writes anything. The first wrong byte ends a group: each has its own."""

    name = "collectives"
    corpus = "collective"

    def begin(self) -> None:
        self.ended = 0

    def feed(self, frame: bytes) -> None:
        ours, theirs = socket.socketpair()
        group = SocketGroup(1, 0, {1: ours})
        with theirs:
            theirs.setblocking(False)
            theirs.send(frame[:PIPE_BYTES])
            theirs.shutdown(socket.SHUT_WR)
            try:
                if self.draw.random() < 0.5:
                    group.all_reduce([1, 2, 3], self.draw.choice(("max", "sum", "and")))
                else:
                    group.all_to_all([NOTHING, NOTHING])
            except EpochEnded:
                self.ended += 1
            finally:
                group.close()


class RendezvousQuestions(Target):
    """What a node that joins asks, and is answered."""

    name = "rendezvous"
    corpus = "rendezvous"
    decode = staticmethod(QUESTION.decode)

    def begin(self) -> None:
        self._here = Here("tcp://a:1", "tcp://a:2", "tcp://a:3")
        self._facts = {"--data-parallel-size": "4", "--engine": "timed"}

    def take(self, message: WhereIs) -> None:
        ANSWER.decode(msgspec.msgpack.encode(answer_to(message, self._here, self._facts)))


class RendezvousAnswers(Target):
    """What a joining node is told."""

    name = "rendezvous-answers"
    corpus = "rendezvous"
    decode = staticmethod(ANSWER.decode)

    def begin(self) -> None:
        """It remembers nothing."""

    def take(self, message: Here) -> None:
        """All of it is used as it is."""


class WatchdogStatus(Target):
    """What is sent to the status port under vLLM."""

    name = "vllm-status"
    corpus = "watchdog"

    def begin(self) -> None:
        self._watchdog = Watchdog({"program": "none"}, None)

    def check(self) -> None:
        self._watchdog._wakeup.close()

    def feed(self, frame: bytes) -> None:
        head, _, body = self._watchdog._answer(frame).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 ")
        json.loads(body)

    def machines(self) -> list[Any]:
        return [self._watchdog]


class HttpBodies(Target):
    """Bodies of both endpoints, as far as the rank that would take them."""

    name = "http-bodies"
    corpus = "http-body"

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        tokenizer = TimedEngine.tokenizer(EngineSettings(rank=0, dp_size=1, threads=1, options={}))
        self._models = Models(["timed"], tokenizer, 512)
        self._decoders = [Decoder(CompletionRequest).decode, Decoder(ChatCompletionRequest).decode]
        self._request = codec.request()

    def begin(self) -> None:
        """It remembers nothing."""

    def feed(self, frame: bytes) -> None:
        for decode in self._decoders:
            try:
                request = decode(frame)
                prepared = prepare(request, Headers(), self._models, "id")
            except ApiError as error:
                assert error.status in (400, 404)
                json.dumps(error.body)
                continue
            for part in prepared.parts:
                add = AddRequest(1, 1, 1, 0, part.prompt_token_ids, part.params, request.priority or 0)
                said_well(add, self._request)
