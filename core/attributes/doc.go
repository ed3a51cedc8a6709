// Package attributes keeps the attributes of contexts: values that all requests
// of an application share, on all nodes that are in the group. An application
// has them of its context:
//
//	const motd = attributes.Attr[string]("motd")
//	a := core.FromContext(r.Context()).Context().Attributes()
//	err := motd.Set(r.Context(), a, "closed on Monday")
//	text, ok, err := motd.Get(a)
//
// Every node has every attribute: reading is a look into memory. A change is
// made here and sent to all others; they have it when the call returns, unless
// one does not answer within a second: it gets the change when it answers again.
// A node that joins has all attributes before it is ready. They outlive the node
// that set them, and the application: a new version of it finds them, whichever
// nodes have it already, and they are gone when they are deleted or the last
// node has stopped. Those of a context that is not distributable stay on their
// node.
//
// Of two changes of one attribute the later one stays, whole and on all nodes,
// also if the two were made on two sides of a split. Later means after the other
// one had arrived; of two that did not know of each other, the one with the
// higher time on its node's clock, and of the same microsecond the one of the
// node with the higher id. A deletion is a change like any other; it is
// remembered for a day. So attributes are for what is set now and then, not for
// counting: read, add one, write loses what another node wrote in between. Use
// the merge rules of a session, or a database, for that.
//
// Values travel and are kept as session.Encode makes them. A value of a type
// that a node does not know is bytes to it: it keeps and passes it on as it is.
//
// The package imports channel, channel/repmap and core/session. It must not
// import core, interceptors, valves or plugins.
package attributes
