package conformance

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins"
)

// MembershipTimes is what a membership promises.
type MembershipTimes struct {
	// Interval is the time between announcements.
	Interval time.Duration
	// Drop is the silence after which a member is lost.
	Drop time.Duration
}

// MembershipSubject is a membership in all its forms.
type MembershipSubject interface {
	Subject
	// Membership makes the instance of the node with the address ip, in mode
	// t.Mode; peers are the addresses of all nodes, its own included. What it
	// needs beside the instance ends with t.
	Membership(t *T, s channel.Settings, ip string, peers []string) (channel.Membership, error)
	Times() MembershipTimes
}

// The features of memberships.
const (
	// FeaturePayload: a changed payload is reported as an update.
	FeaturePayload = "payload"
	// FeatureLossTolerant: nobody is lost when a fifth of all datagrams is.
	FeatureLossTolerant = "loss-tolerant"
)

type membership[C any] struct {
	name     string
	make     func(C, channel.Settings) (channel.Membership, error)
	cfg      func(ip string, peers []string) C
	times    MembershipTimes
	features []string
}

// Membership is the subject of a membership's constructor. cfg makes the
// configuration of the node with the address ip in a group of peers (addresses
// like 10.0.0.1, the node's own included). times is what that configuration
// promises. features are those the membership has. It is tried directly and
// bridged.
func Membership[C any](name string, newFn func(C, channel.Settings) (channel.Membership, error), cfg func(ip string, peers []string) C, times MembershipTimes, features ...string) Subject {
	return &membership[C]{name, newFn, cfg, times, features}
}

// Describe implements Subject.
func (m *membership[C]) Describe() (Description, error) {
	if m.times.Interval <= 0 || m.times.Drop <= m.times.Interval {
		return Description{}, fmt.Errorf("membership %s: the times are not positive, or it drops members sooner than they announce themselves", m.name)
	}
	details, err := json.Marshal(struct {
		Config   json.RawMessage `json:"config,omitempty"`
		Interval string          `json:"interval"`
		Drop     string          `json:"drop"`
	}{configJSON(m.cfg("10.0.0.1", []string{"10.0.0.1", "10.0.0.2"})), m.times.Interval.String(), m.times.Drop.String()})
	if err != nil {
		return Description{}, err
	}
	return Description{
		Kind: ProfileMembership, Name: m.name, Features: m.features,
		Modes: []core.PluginMode{core.Direct, core.Bridged}, Details: details,
	}, nil
}

// Times implements MembershipSubject.
func (m *membership[C]) Times() MembershipTimes { return m.times }

// Membership implements MembershipSubject.
func (m *membership[C]) Membership(t *T, s channel.Settings, ip string, peers []string) (channel.Membership, error) {
	cfg := m.cfg(ip, peers)
	if t.Mode == core.Direct {
		return m.make(cfg, s)
	}
	// The configuration is a Go value already: the options are left empty.
	f := channel.Factory[channel.Membership]{
		Name: m.name, Source: "subject",
		Check: func(channel.Decode) error { return nil },
		New:   func(_ channel.Decode, s channel.Settings) (channel.Membership, error) { return m.make(cfg, s) },
	}
	h, err := t.PluginHost(plugins.Config{Memberships: []core.MembershipFactory{f}}, s)
	if err != nil {
		return nil, err
	}
	return h.Membership(core.PluginSpec{Name: m.name, Mode: t.Mode}, s)
}

// PluginHost returns a host of plugins that is stopped when t ends.
func (t *T) PluginHost(c plugins.Config, s channel.Settings) (*plugins.Host, error) {
	h, err := plugins.NewHost(c, s)
	if err != nil {
		return nil, err
	}
	t.note.mu.Lock()
	t.note.hosts = append(t.note.hosts, h)
	t.note.mu.Unlock()
	t.Cleanup(func() { t.within("stop of the plugin host", func() error { return h.Stop(t.background()) }) })
	return h, nil
}
