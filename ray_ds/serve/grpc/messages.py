"""The gRPC service `ray_ds.Generation`: its messages and methods, described in code.

No generated file ties the package to a version of protoc. Clients in any language ask the server for the description
by reflection, as grpcurl does; in Python these classes are the messages.
"""

from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf import descriptor_pool, message_factory  # type: ignore[import-untyped]
from google.protobuf.descriptor_pb2 import (  # type: ignore[import-untyped]
    FieldDescriptorProto,
    FileDescriptorProto,
)

PACKAGE = "ray_ds"
SERVICE = f"{PACKAGE}.Generation"

_STRING = FieldDescriptorProto.TYPE_STRING
_INT64 = FieldDescriptorProto.TYPE_INT64
_DOUBLE = FieldDescriptorProto.TYPE_DOUBLE
_BOOL = FieldDescriptorProto.TYPE_BOOL
Fields = dict[str, tuple[int, FieldDescriptorProto.Type.ValueType]]

GENERATE_REQUEST: Fields = {
    "model": (1, _STRING),
    "prompt": (2, _STRING),
    "max_tokens": (4, _INT64),
    "temperature": (5, _DOUBLE),
    "top_p": (6, _DOUBLE),
    "top_k": (7, _INT64),
    "min_p": (8, _DOUBLE),
    "presence_penalty": (9, _DOUBLE),
    "frequency_penalty": (10, _DOUBLE),
    "repetition_penalty": (11, _DOUBLE),
    "seed": (12, _INT64),
    "min_tokens": (15, _INT64),
    "ignore_eos": (16, _BOOL),
}
"""Fields of a completion (`serve.http.completions.CompletionBody`) under their names there; those left out count as
left out there."""
GENERATE_LISTS: Fields = {"prompt_token_ids": (3, _INT64), "stop": (13, _STRING), "stop_token_ids": (14, _INT64)}
"""The same, several values each; `prompt_token_ids` are a `prompt` in ids."""
GENERATE_REPLY: Fields = {
    "text": (1, _STRING),
    "finish_reason": (2, _STRING),
    "prompt_tokens": (3, _INT64),
    "completion_tokens": (4, _INT64),
    "cached_tokens": (5, _INT64),
}
"""An answer. In a stream a part of one: `text` goes on, the rest is set on the last reply alone."""
HEALTH_REPLY: Fields = {"is_ready": (1, _BOOL), "reason": (2, _STRING), "model": (3, _STRING), "digest": (4, _STRING)}


def _describe() -> FileDescriptorProto:
    file = FileDescriptorProto(name="ray_ds/generation.proto", package=PACKAGE, syntax="proto3")
    _add_message(file, "GenerateRequest", GENERATE_REQUEST, GENERATE_LISTS)
    _add_message(file, "GenerateReply", GENERATE_REPLY)
    _add_message(file, "HealthRequest", {})
    _add_message(file, "HealthReply", HEALTH_REPLY)
    service = file.service.add(name="Generation")
    for name, asked, answered, streams in METHODS:
        service.method.add(
            name=name,
            input_type=f".{PACKAGE}.{asked}",
            output_type=f".{PACKAGE}.{answered}",
            server_streaming=streams,
        )
    return file


def _add_message(file: FileDescriptorProto, name: str, fields: Fields, lists: Fields | None = None) -> None:
    """Add a message; a field that is no list knows whether it was set, proto3's `optional`."""
    message = file.message_type.add(name=name)
    for field, (number, kind) in fields.items():
        message.field.add(
            name=field,
            number=number,
            type=kind,
            label=FieldDescriptorProto.LABEL_OPTIONAL,
            proto3_optional=True,
            oneof_index=len(message.oneof_decl),
        )
        message.oneof_decl.add(name=f"_{field}")
    for field, (number, kind) in (lists or {}).items():
        message.field.add(name=field, number=number, type=kind, label=FieldDescriptorProto.LABEL_REPEATED)


METHODS = (
    ("Generate", "GenerateRequest", "GenerateReply", False),
    ("GenerateStream", "GenerateRequest", "GenerateReply", True),
    ("Health", "HealthRequest", "HealthReply", False),
)
"""Name, request, reply, whether the replies are a stream."""
FILE = descriptor_pool.Default().AddSerializedFile(_describe().SerializeToString())


def _message_class(name: str) -> Any:
    found = message_factory.GetMessageClass(FILE.message_types_by_name[name])
    found.__module__ = __name__  # Serve pickles requests on their way from the proxy, by the class's place
    return found


GenerateRequest = _message_class("GenerateRequest")
GenerateReply = _message_class("GenerateReply")
HealthRequest = _message_class("HealthRequest")
HealthReply = _message_class("HealthReply")


def add_generation_servicer(servicer: Any, server: Any) -> None:
    """Register a servicer's methods; Ray Serve takes this function by name in `grpc_servicer_functions`."""
    classes = {own.DESCRIPTOR.name: own for own in (GenerateRequest, GenerateReply, HealthRequest, HealthReply)}
    handlers = {}
    for name, asked, answered, streams in METHODS:
        handler = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[name] = handler(
            getattr(servicer, name),
            request_deserializer=classes[asked].FromString,
            response_serializer=classes[answered].SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
