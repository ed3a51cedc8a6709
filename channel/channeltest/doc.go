// Package channeltest tests code that uses package channel: interceptors,
// memberships, senders, whole nodes. It holds an embedded stack without a
// network, a recorder of messages and events, and a simulated network
// ([SimNet]) that runs in virtual time and repeats by seed.
//
// It imports package channel, pion's vnet and testing; it must not import core,
// interceptors, valves or plugins, and only tests import it.
package channeltest
