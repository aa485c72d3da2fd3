"""An engine of one's own, whole: it answers with its prompt, a token a step.

paceline serve --engine examples.echo_engine:EchoEngine
curl localhost:8000/v1/completions -d '{"prompt": "hello", "max_tokens": 5}'
"""

from paceline.core.load import Load
from paceline.core.rank.events import StepOutput
from paceline.engines.base import Engine, EngineRequest, EngineSettings, Progress, StepResult


class Bytes:  # The front-end's side: text to tokens. Here a token is a byte.
    model_name, max_model_len, vocabulary_size, longest_piece, sampling_defaults = "echo", 4096, 256, 1, {}
    chat_template = None

    def encode(self, text, *, add_special=True, parse_special=False):
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")

    def chat(self, conversation):
        return [conversation.messages[-1]["content"]]


class EchoEngine(Engine):
    def __init__(self) -> None:
        self.requests: dict[int, tuple[EngineRequest, int]] = {}

    @classmethod
    def create(cls, settings: EngineSettings, progress: Progress) -> "EchoEngine":
        return cls()

    @classmethod
    def tokenizer(cls, settings: EngineSettings) -> Bytes:
        return Bytes()

    def add(self, request: EngineRequest) -> None:
        self.requests[request.key] = (request, 0)

    def abort(self, key: int) -> None:
        self.requests.pop(key, None)

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> StepResult:
        outputs = []
        for key, (request, made) in list(self.requests.items()):
            token = request.prompt_token_ids[made % len(request.prompt_token_ids)]
            ended = made + 1 >= request.params.max_tokens
            outputs.append(StepOutput(key, [token], chr(token), "length" if ended else None))
            self.requests[key] = (request, made + 1)
            if ended:
                self.abort(key)
        return StepResult(outputs, decoded_tokens=len(outputs))

    def load(self) -> Load:
        return Load(running=len(self.requests), slots=1024)
