package valves

import (
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/valves/accesslog"
	"github.com/longhouse-go/longhouse/valves/errorreport"
	"github.com/longhouse-go/longhouse/valves/health"
	"github.com/longhouse-go/longhouse/valves/persistent"
	"github.com/longhouse-go/longhouse/valves/remoteip"
	"github.com/longhouse-go/longhouse/valves/replication"
	"github.com/longhouse-go/longhouse/valves/routebinder"
	"github.com/longhouse-go/longhouse/valves/singlesignon"
)

// Builtin returns the factories of all built-in valves, in the order in which
// they usually stand in a pipeline.
func Builtin() []core.ValveFactory {
	return []core.ValveFactory{
		accesslog.Factory,
		remoteip.Factory,
		errorreport.Factory,
		health.Factory,
		routebinder.Factory,
		replication.Factory,
		persistent.Factory,
		singlesignon.Factory,
	}
}
