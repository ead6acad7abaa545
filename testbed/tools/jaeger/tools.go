//go:build tools

// Package tools pins the Jaeger that the tracing test asks: built from its Go module, test-only.
package tools

import _ "github.com/jaegertracing/jaeger/cmd/all-in-one"
