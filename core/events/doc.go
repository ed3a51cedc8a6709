// Package events carries what happens to sessions from node to node, for session
// listeners that want to hear of all nodes ([core.SessionListening].Cluster). It
// works beside the managers, so it does not matter which one a context has.
//
// # What is guaranteed
//
// In a context with such listeners, on every node that has them:
//
//   - each session is told as created once and as destroyed once. A node that
//     joins hears of those that are there as created, with Existing set; so do
//     both sides of a split when it heals;
//   - the end is the last thing told of a key. What one node does to a session is
//     told in that order; what different nodes do to one session at the same time
//     may be told in different orders on different nodes (Version says which
//     change of an attribute counts);
//   - each change of an attribute is told once, not joined with others, if the
//     context's listeners want those kinds; not those of the time before a node
//     has joined, or while it was cut off or could not be told for long;
//   - a session whose node dies, and that nobody uses again, is looked for by the
//     others when it would have expired: one that the manager still has goes on
//     and expires on one of them, one that it has not is told as expired. Local
//     is set where it was found out. That takes up to two TouchIntervals of the
//     table longer than on the node itself;
//   - an end that could not be told, because its node died with it, is told that
//     way too, as expired;
//   - if a session expires on one side of a split and is used on the other, its end
//     there is told when the split heals: the end counts. What ended within the last
//     hour, or 65,536 ends, is told with its reason then; after a longer split the
//     side that does not know of it may make the other hear of it once more;
//   - an end or a new id that only the manager has told, because the node that made
//     it died with the news, is told some seconds late.
//
// A session that nobody of the living nodes has ever heard of, as after a restart
// of all nodes, is told when it is used again; its expiry before that is not.
// Messages wait for each member in a queue (Config.Queue); if it overflows, that
// member is told afterwards which sessions there are, and finds out which ended.
//
// # How it works
//
// Nodes ask each other for the kinds that their listeners want, per context, and
// are answered with the living sessions, with what has ended lately, and from then
// on with what happens; nobody who is not asked sends anything. Each asker notes which session is on which
// node. Messages are batches, one at a time per member, repeated until the member
// has them or has gone.
//
// It imports core, core/session, core/table and channel; it must not import
// interceptors, valves, plugins, fx or the container.
package events
