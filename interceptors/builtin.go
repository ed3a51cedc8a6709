package interceptors

import (
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
)

// Builtin returns the factories of all built-in interceptors, in the order in
// which they are usually stacked, nearest to the application first.
func Builtin() []channel.Factory[channel.Interceptor] {
	return []channel.Factory[channel.Interceptor]{
		throughput.Factory,
		dispatch.Factory,
		failuredetector.Factory,
	}
}
