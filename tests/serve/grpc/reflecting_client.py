"""A gRPC client that knows no more of the service than the server tells by reflection."""

from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

KEY = (("authorization", "Bearer sk-test"),)


class ReflectingClient:
    """Calls methods of `ray_ds.Generation` by name."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self.service = self._pool.FindServiceByName("ray_ds.Generation")

    def call(self, method: str, metadata: Any = KEY, **fields: Any) -> Any:
        found = self.service.methods_by_name[method]
        asked, answered = (message_factory.GetMessageClass(own) for own in (found.input_type, found.output_type))
        kind = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        path = f"/{self.service.full_name}/{method}"
        stub = kind(path, request_serializer=asked.SerializeToString, response_deserializer=answered.FromString)
        return stub(asked(**fields), metadata=metadata, timeout=10)
