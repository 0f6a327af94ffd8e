"""Server reflection in both of its versions: what clients ask first, and what those ask that are older than it.

grpcio-reflection has v1alpha only. v1 is the same protocol under another name: the messages are equal on the wire, so
one servicer answers both; its descriptor is v1alpha's under v1's names, for those who ask reflection about itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

_ALPHA = reflection_pb2.DESCRIPTOR.package
_PACKAGE = "grpc.reflection.v1"
_FILE = "grpc/reflection/v1/reflection.proto"
SERVICE_NAMES = (f"{_PACKAGE}.ServerReflection", reflection.SERVICE_NAME)


def enable_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Have the server tell of these services, and of itself."""
    _describe()
    names = (*services, *SERVICE_NAMES)
    reflection.enable_server_reflection(names, server)
    servicer: Any = reflection.aio.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = grpc.method_handlers_generic_handler(SERVICE_NAMES[0], {"ServerReflectionInfo": handler})
    server.add_generic_rpc_handlers((handlers,))


def _describe() -> None:
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_FILE)
    except KeyError:
        described = FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(described)
        described.name, described.package = _FILE, _PACKAGE
        for message in described.message_type:
            for field in message.field:
                if field.type_name:
                    field.type_name = field.type_name.replace(f".{_ALPHA}.", f".{_PACKAGE}.")
        for method in described.service[0].method:
            method.input_type = method.input_type.replace(f".{_ALPHA}.", f".{_PACKAGE}.")
            method.output_type = method.output_type.replace(f".{_ALPHA}.", f".{_PACKAGE}.")
        pool.AddSerializedFile(described.SerializeToString())
