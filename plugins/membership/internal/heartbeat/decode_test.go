package heartbeat

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/wire"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// FuzzDatagram gives arbitrary datagrams to the decoder and what it accepts to
// the table: nothing may panic, every refusal has a counter, and an accepted
// datagram is exactly the record it was read as.
func FuzzDatagram(f *testing.F) {
	host := netip.MustParseAddr("10.0.0.9")
	for _, m := range []channel.Member{
		{ID: channel.UniqueID{1}, Host: host, Port: 4000, SecurePort: -1, UDPPort: -1},
		{ID: channel.UniqueID{2}, Host: netip.MustParseAddr("fd00::1"), Port: 1, SecurePort: 2, UDPPort: 3, Domain: "d", Payload: "p"},
		{ID: channel.UniqueID{1}, Host: host, Port: 4000, SecurePort: -1, UDPPort: -1, Command: channel.ShutdownCommand, Alive: time.Second},
	} {
		f.Add(wire.AppendMember(nil, m))
	}
	f.Add([]byte{})
	f.Add([]byte("TRIBES-B\x01\x00"))
	metrics := channel.NewMetrics()
	m := New(Config{}, channel.Settings{Metrics: metrics})
	local := channel.Member{ID: channel.UniqueID{7}, Host: host, Port: 4001, SecurePort: -1, UDPPort: -1}
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, reason := decode(b)
		if reason != "" {
			if m.counters.bad[reason] == nil {
				t.Fatalf("no counter for %q", reason)
			}
			return
		}
		if again := wire.AppendMember(nil, rec); rec.Alive.Abs() < 1<<61 && !bytes.Equal(again, b) {
			t.Fatalf("read %+v from %x, wrote %x", rec, b, again)
		}
		table := membership.New(membership.Config{}, local)
		_, refusal := table.Heard(nil, rec, time.Now())
		if refusal != "" && refusal != membership.Own && m.counters.refused[refusal] == nil {
			t.Fatalf("no counter for %q", refusal)
		}
	})
}
