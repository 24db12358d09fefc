package main

// Debian's gRPC for Go encodes messages with a library that is older than the plugins that generate them. This codec
// has the current one.

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
)

type codec struct{}

func init() {
	encoding.RegisterCodec(codec{})
}

func (codec) Name() string {
	return "proto"
}

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}
