// Package channel is group communication: members that find each other, a view
// of who is there, and messages that pass an ordered stack of interceptors on
// their way to the wire and back. Its bytes are those of Apache Tribes, so that
// Longhouse and Tomcat nodes can stand in one group.
//
//	application      Channel.Send                 Listener
//	                     │ down                      ▲ up
//	interceptors     throughput · dispatch · failure detector · …
//	                     ▼                           │
//	coordinator      Sender · Receiver · Membership (wire codec over transport.Net)
//
// The package is usable alone, without any HTTP server. It imports the standard
// library, zap, CBOR and the root package of pion/transport; it must not import
// its own sub-packages (sender, receiver and membership arrive through
// [Config]), core, interceptors, valves, plugins, fx, go-plugin or grpc.
package channel
