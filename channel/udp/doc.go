// Package udp brings messages to other nodes as datagrams, in the bytes of
// Apache Tribes: those with the option UDP to a member's UDP port, those with
// the option Multicast to a group. A [Transport] stands around a sender and a
// receiver, usually those of channel/tcp, and leaves all other messages to them.
//
//	Send ──► Multicast? ──► one datagram to the group, no acknowledgement
//	     ├─► UDP?       ──► one datagram to each member, acknowledged if asked for
//	     └─► the next sender
//
// A message travels as one frame in one datagram; one whose frame is larger than
// MaxFrame is refused. Datagrams may be lost, doubled or overtaken. Without an
// acknowledgement nobody learns of it; with one, the same datagram is sent again.
// Nothing here holds back a sender that is faster than the network.
//
// The package imports package channel, channel/wire, zap and the root package of
// pion/transport. It must not reach the network except through
// channel.Settings.Net.
package udp
