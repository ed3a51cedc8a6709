package tcp

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/pion/transport/v2"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/wire"
)

// What Tomcat nodes sent each other, replayed to a receiver: every message
// arrives, and whoever waits for an acknowledgement gets it.
func TestCapturedMessages(t *testing.T) {
	text, err := os.ReadFile("../wire/testdata/captured.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct{ Kind, Transport, Hex string }
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	both(t, func(t *testing.T, a, b transport.Net, host string) {
		var got atomic.Int64
		to := receive(t, b, host, false, func(context.Context, *channel.Message) error { got.Add(1); return nil })
		nodes := map[channel.UniqueID]*replayed{}
		sent, acks := 0, 0
		for _, v := range file.Vectors {
			if v.Kind != "frame" || v.Transport != "tcp" {
				continue
			}
			f, err := hex.DecodeString(v.Hex)
			if err != nil {
				t.Fatal(err)
			}
			var m channel.Message
			if _, _, err := wire.DecodeFrame(f, wire.DefaultMaxFrame, &m); err != nil {
				t.Fatal(err)
			}
			n := nodes[m.From.ID]
			if n == nil {
				n = &replayed{raw: dialRaw(t, a, to)}
				nodes[m.From.ID] = n
			}
			n.write(f)
			sent++
			if m.Options.Has(channel.UseAck) {
				n.acks++
				acks++
			}
		}
		for id, n := range nodes {
			if got := n.raw.acks(n.acks); strings.Contains(got, "-") {
				t.Errorf("node %v got %s", id, got)
			}
		}
		eventually(t, "all are delivered", func() bool { return int(got.Load()) == sent })
		if sent < 100 || acks < 50 {
			t.Errorf("only %d messages, %d with acknowledgement", sent, acks)
		}
	})
}

// replayed counts the acknowledgements that a captured node expects.
type replayed struct {
	*raw
	acks int
}
