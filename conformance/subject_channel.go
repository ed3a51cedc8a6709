package conformance

import (
	"context"

	"github.com/longhouse-go/longhouse/channel"
)

// Group is a node's place in a group, as the checks use it. *channel.Channel is
// one.
type Group interface {
	Start(ctx context.Context) error
	Stop(ctx context.Context) error
	Send(ctx context.Context, to []channel.Member, body []byte, o channel.Options) error
	SendDone(ctx context.Context, to []channel.Member, body []byte, o channel.Options, done channel.Completion) error
	Listen(l channel.Listener) (cancel func())
	Watch(w func(channel.View, channel.MemberEvent)) (cancel func())
	View() channel.View
	Local() channel.Member
}

// Place is what a channel to be tested is made of, beside its own parts.
type Place struct {
	channel.Settings
	// IP is the address to listen on.
	IP string
	// Membership reports what the check wants. Use it, or one that finds the
	// other nodes in time.
	Membership channel.Membership
	// Bottom must stand below all other layers: the check looks and meddles
	// there.
	Bottom channel.Layer
}

// ChannelSubject is a channel.
type ChannelSubject interface {
	Subject
	// Channel makes a channel that has not started.
	Channel(t *T, p Place) (Group, error)
}

// The features of channels.
const (
	// FeatureAsync: the option Async is honoured.
	FeatureAsync = "async"
	// FeatureSyncAck: so is SyncAck.
	FeatureSyncAck = "sync-ack"
)

type channelSubject struct {
	name     string
	build    func(Place) (Group, error)
	features []string
}

// Channel is the subject of a way to put a channel together. It runs on a
// simulated network, in virtual time.
func Channel(name string, build func(Place) (*channel.Channel, error), features ...string) Subject {
	return channelSubject{name, func(p Place) (Group, error) {
		c, err := build(p)
		if err != nil {
			return nil, err
		}
		return c, nil
	}, features}
}

// Describe implements Subject.
func (c channelSubject) Describe() (Description, error) {
	return Description{Kind: ProfileChannel, Name: c.name, Features: c.features}, nil
}

// Channel implements ChannelSubject.
func (c channelSubject) Channel(_ *T, p Place) (Group, error) { return c.build(p) }
