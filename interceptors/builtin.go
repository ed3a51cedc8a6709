package interceptors

import (
	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/interceptors/coordinator"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/domain"
	"github.com/longhouse-go/longhouse/interceptors/encrypt"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/fragment"
	"github.com/longhouse-go/longhouse/interceptors/gzip"
	"github.com/longhouse-go/longhouse/interceptors/order"
	"github.com/longhouse-go/longhouse/interceptors/ping"
	"github.com/longhouse-go/longhouse/interceptors/staticmember"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
	"github.com/longhouse-go/longhouse/interceptors/totalorder"
	"github.com/longhouse-go/longhouse/interceptors/twophase"
	"github.com/longhouse-go/longhouse/interceptors/zstd"
)

// Builtin returns the factories of all built-in interceptors, in the order in
// which they are usually stacked, nearest to the application first.
func Builtin() []channel.Factory[channel.Interceptor] {
	return []channel.Factory[channel.Interceptor]{
		throughput.Factory,
		coordinator.Factory,
		twophase.Factory,
		domain.Factory,
		totalorder.Factory,
		dispatch.Factory,
		gzip.Factory,
		zstd.Factory,
		fragment.Factory,
		order.Factory,
		encrypt.Factory,
		ping.Factory,
		failuredetector.Factory,
		staticmember.Factory,
	}
}
