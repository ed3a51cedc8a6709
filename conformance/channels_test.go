package conformance_test

import (
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/tcp"
	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/failuredetector"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
)

// build makes a channel of the usual parts, pipelined or as toward Tomcat.
func build(pipelined bool, layers func(s channel.Settings) ([]channel.Interceptor, error)) func(p conformance.Place) (*channel.Channel, error) {
	return func(p conformance.Place) (*channel.Channel, error) {
		own, err := layers(p.Settings)
		if err != nil {
			return nil, err
		}
		var all []channel.Layer
		for _, l := range own {
			all = append(all, channel.Layer{Interceptor: l})
		}
		stack, err := channel.NewStack(append(all, p.Bottom)...)
		if err != nil {
			return nil, err
		}
		rc := tcp.DefaultReceiverConfig()
		rc.Address = p.IP
		return channel.New(channel.Config{
			Announcement: channel.Announcement{Name: p.Name, Pipelined: pipelined}, Stack: stack,
			Sender: tcp.NewSender(tcp.DefaultSenderConfig(), p.Settings), Receiver: tcp.NewReceiver(rc, p.Settings), Membership: p.Membership,
		}, p.Settings)
	}
}

// Our channel is conformant, bare and with all layers, and toward peers that
// are no Longhouse nodes.
func TestChannels(t *testing.T) {
	bare := func(channel.Settings) ([]channel.Interceptor, error) { return nil, nil }
	full := func(s channel.Settings) ([]channel.Interceptor, error) {
		a, err := throughput.New(throughput.Defaults, s)
		if err != nil {
			return nil, err
		}
		b, err := dispatch.New(dispatch.Defaults, s)
		if err != nil {
			return nil, err
		}
		c, err := failuredetector.New(failuredetector.Defaults, s)
		return []channel.Interceptor{a, b, c}, err
	}
	conformant(t, conformance.Channel("bare", build(true, bare), conformance.FeatureSyncAck))
	conformant(t, conformance.Channel("full", build(true, full), conformance.FeatureSyncAck, conformance.FeatureAsync))
	conformant(t, conformance.Channel("tribes", build(false, full), conformance.FeatureSyncAck, conformance.FeatureAsync))
}

func TestOwnWire(t *testing.T) { conformant(t, conformance.Wire("longhouse", conformance.OwnCodec())) }
