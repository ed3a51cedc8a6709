// Package staticservice is the membership of configured members that Tomcat
// calls StaticMembershipService: nodes tell each other over the channel itself
// that they are there. Longhouse and Tomcat nodes can stand in one such group.
//
//	start   an RPC request with the sender's member; the reply holds the other's
//	ping    the same, every second
//	stop    a message, when a node leaves
//
// All three are Java objects, MemberMessage, under the id "<channel>-StaticMembership";
// the name of the channel is "<cluster name>-Channel" in Tomcat. Nothing of it
// is authenticated unless a layer of the stack does that.
//
// Between Longhouse nodes the static membership plugin does the same with less
// traffic. This one needs the channel it works for, so it runs in the process of
// the node: give it to channel.Config, and channel.New attaches it.
//
// The package imports channel and channel/wire/jser. It must not import core,
// interceptors, valves or plugins.
package staticservice
