"""The bodies of requests and responses: OpenAI's, and a few fields of our own.

A field that OpenAI has and that would change the answer, but that this server cannot honour, must
be null or empty; one that changes nothing here (such as ``user``) is accepted. Any other field is
refused, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from idlm.decoding.layout import MAX_STRIDE

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finish = Literal["stop", "length"]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A request body, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _with_examples(*bodies: dict[str, Any]) -> ConfigDict:
    """Whole bodies that the schema shows; tools make requests of their own from them."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


_SKY = [{"role": "user", "content": "Why is the sky blue?"}]


class StreamOptions(Body):
    """What a stream says besides text."""

    include_usage: bool | None = Field(None, description="Send the usage in a last chunk.")
    include_obfuscation: bool | None = Field(None, description="Accepted; changes nothing.")


class TextFormat(Body):
    """Any text: the default."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A schema; every one is kept to, whatever ``strict`` says."""

    name: str
    schema_: dict[str, Any] = Field({}, alias="schema", description="JSON schema.")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class GenerationBody(Body):
    """What both endpoints take."""

    model: str | None = Field(None, description="A name of /v1/models; null: the only one.")
    stream: bool | None = Field(None, description="Send server-sent events as text comes.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128, description="Choices; choice i gets seed + i.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; null is 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = Field(
        None, description="Strings that end the text; they are not part of it."
    )
    seed: Seed | None = Field(None, description="The same seed gives the same text.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id, as a string, to a bias of its logit."
    )
    response_format: ResponseFormat | None = Field(None, description="Keep the text to JSON.")
    # Ours.
    guided_regex: str | None = Field(
        None, max_length=4096, description="Keep the whole text to a regular expression."
    )
    top_k: int | None = Field(None, ge=-1, description="Keep the k likeliest tokens; 0: all.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Drop tokens below this share of the likeliest one's."
    )
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = Field(None, description="Go on past the model's end tokens.")
    stop_token_ids: list[TokenId] | None = None
    stride: int | None = Field(
        None, ge=1, le=MAX_STRIDE, description="Most tokens per forward; 1: plain autoregression."
    )
    verification: Literal["rejection", "coupled"] | None = Field(
        None, description="How drafts are tested; both are exact."
    )
    return_details: bool | None = Field(
        None, description="Say of every token how it came about, and the counts so far."
    )
    # OpenAI's, without an effect here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, description="Accepted; changes nothing.")
    # An answer of the `openai` client, given back as it is, has these.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatCompletionBody(GenerationBody):
    """The body of ``/v1/chat/completions``."""

    model_config = _with_examples(
        {"messages": _SKY, "temperature": 0.7, "seed": 1},
        {"messages": _SKY, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _SKY, "n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["\n"]},
        {"messages": _SKY, "response_format": {"type": "json_object"}, "stride": 4},
    )

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="As max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # Not supported.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: None = None
    function_call: None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: None = None
    verbosity: None = None


class CompletionBody(GenerationBody):
    """The body of ``/v1/completions``."""

    model_config = _with_examples(
        {"prompt": "1, 2, 3,", "temperature": 0},
        {"prompt": ["One", "Two"], "n": 2, "echo": True, "logprobs": 2, "stream": True},
        {"prompt": "Answer:", "guided_regex": " (yes|no)", "verification": "coupled"},
    )

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        description="Text or token ids; one prompt or several."
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(None, ge=0, le=20, description="With echo, of the prompt too.")
    max_tokens: int | None = Field(
        None, ge=0, description="0 is for echo with logprobs: the prompt is scored, no more."
    )
    # Not supported.
    suffix: Literal[""] | None = None
    best_of: None = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every failure."""

    error: ErrorDetail


def _absent(value: object) -> bool:
    return value is None


def optional(**options: Any) -> Any:
    """A field of a response that is left out when it is None."""
    return Field(default=None, exclude_if=_absent, **options)


class Usage(BaseModel):
    """Tokens of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    tokens_per_forward: float | None = Field(
        description="Tokens by forward passes; a prompt's last forward gives a token like others."
    )


class TokenLogprob(BaseModel):
    """A token and its log-probability under the model, before temperature and the like."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The same for a token of the answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer or a chunk."""

    content: list[ChosenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the form of ``/v1/completions``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class Run(BaseModel):
    """A token's text and how the token came about: ``sampled``, ``draft`` or ``correction``."""

    text: str
    source: str
    token_id: int


class Details(BaseModel):
    """How a choice came about: new tokens, and counts since its beginning."""

    runs: list[Run]
    tokens: int
    forwards: int
    accepted_by_place: list[int]
    reached_by_place: list[int]
    seconds: float = Field(description="Since the choice began to run.")


class Answer(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    details: Details | None = optional()


class Delta(BaseModel):
    """New text of an answer."""

    role: Literal["assistant"] | None = optional()
    content: str | None = optional()


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    details: Details | None = optional()


class Reply(BaseModel):
    """What all responses begin with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Reply):
    """A response of ``/v1/chat/completions``."""

    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(Reply):
    """An event of a stream of ``/v1/chat/completions``."""

    choices: list[ChatChunkChoice]
    usage: Usage | None = optional()


class CompletionChoice(BaseModel):
    """One text, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    details: Details | None = optional()


class Completion(Reply):
    """A response of ``/v1/completions``, or an event of its stream."""

    choices: list[CompletionChoice]
    usage: Usage | None = optional()


class ModelCard(BaseModel):
    """A served model; beyond OpenAI's fields, how it is decoded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "idlm"
    max_model_len: int
    layout: str = Field(description="With the stride `auto`, both are chosen for every forward.")
    stride: int | Literal["auto"]
    verification: str


class ModelList(BaseModel):
    """All served models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "shutting down"]
    running: int
    waiting: int


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The body or a value in it is wrong.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too large.",
        429: "Too many requests wait; Retry-After says when to try again.",
        500: "The server failed on this request.",
        503: "The server is shutting down or out of memory.",
        504: "The request took too long.",
    }.items()
}
