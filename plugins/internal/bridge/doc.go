// Package bridge carries the plugin interfaces (core.Manager,
// channel.Membership, core.Deployer and the host interfaces they call back)
// across a frame connection, in both directions. For each kind there is a
// client type, which implements the interface for the node by talking to a
// plugin, and a server, which serves an implementation to a node. Neither side
// of the interface can tell that the border is there, except that calls take
// longer; errors keep their identity.
//
// It also holds the control plane (the generated gRPC code is imported here and
// nowhere else) as plain Go types.
//
// It imports channel, core, core/session and core/config, and must not import
// package plugins, interceptors, valves or fx.
package bridge
