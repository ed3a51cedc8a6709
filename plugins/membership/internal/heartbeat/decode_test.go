package heartbeat

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/membership"
	"github.com/longhouse-go/longhouse/channel/secret"
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
		h, reason := m.opener.open(b)
		rec := h.rec
		if reason != "" {
			if m.counters.bad[reason] == nil {
				t.Fatalf("no counter for %q", reason)
			}
			return
		}
		if again := wire.AppendMember(nil, rec); rec.Alive.Abs() < 1<<61 && !bytes.HasPrefix(b, again) {
			t.Fatalf("read %+v from %x, wrote %x", rec, b, again)
		}
		table := membership.New(membership.Config{}, local)
		_, refusal := table.Heard(nil, rec, time.Now())
		if refusal != "" && refusal != membership.Own && m.counters.refused[refusal] == nil {
			t.Fatalf("no counter for %q", refusal)
		}
	})
}

// FuzzSealed changes sealed heartbeats: what is taken for sealed is exactly what
// was sealed.
func FuzzSealed(f *testing.F) {
	s := Security{Secret: secret.New("a secret of sixteen bytes or more")}
	keys, err := s.keys()
	if err != nil {
		f.Fatal(err)
	}
	o, err := newOpener(keys)
	if err != nil {
		f.Fatal(err)
	}
	p, err := newProofs(keys, nil, time.Second)
	if err != nil {
		f.Fatal(err)
	}
	genuine := map[string]bool{}
	now := time.Now()
	p.turned = now     // with a nonce of zeros: the processes of a fuzzer must agree
	for i := range 2 { // lists of more have no order
		rec := channel.Member{ID: channel.UniqueID{byte(i + 1)}, Host: netip.MustParseAddr("10.0.0.9"), Port: 4000, SecurePort: -1, UDPPort: -1, Payload: "p"}
		b := p.seal(wire.AppendMember(nil, rec), now)
		h, reason := o.open(b)
		if reason != "" || !h.sealed || h.rec != rec || len(h.asked) != i*word || len(h.echoes) != i*word {
			f.Fatalf("own heartbeat: %q, %+v", reason, h)
		}
		genuine[string(b)] = true
		f.Add(b)
		p.ask(channel.UniqueID{byte(i), 7}, now)
		p.owe([word]byte{byte(i), 8}, now)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, reason := o.open(b)
		if reason == "" && h.sealed && !genuine[string(b)] {
			t.Fatalf("taken for sealed: %x", b)
		}
		if reason != "" && h.sealed {
			t.Fatal("refused and sealed")
		}
	})
}

func TestSealsAreBounded(t *testing.T) {
	s := Security{Secret: secret.New("a secret of sixteen bytes or more")}
	keys, err := s.keys()
	if err != nil {
		t.Fatal(err)
	}
	p, err := newProofs(keys, nil, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for range 3 * maxProofs {
		p.ask(channel.NewUniqueID(), now)
		p.owe(wordOf(channel.NewUniqueID()), now)
	}
	if len(p.asked) != maxProofs || len(p.owed) > maxProofs {
		t.Errorf("%d asked, %d owed", len(p.asked), len(p.owed))
	}
	if b := p.seal(nil, now); len(b) != maxSeal {
		t.Errorf("a seal of %d bytes", len(b))
	}
	if b := p.seal(make([]byte, maxDatagram-minSeal-3*word), now); len(b) > maxDatagram {
		t.Errorf("a datagram of %d bytes", len(b))
	}
	if b := p.seal(nil, now.Add(time.Minute)); len(b) != minSeal || len(p.asked)+len(p.owed) != 0 {
		t.Errorf("a minute later a seal of %d bytes, %d asked, %d owed", len(b), len(p.asked), len(p.owed))
	}
}

func BenchmarkSealed(b *testing.B) {
	s := Security{Secret: secret.New("a secret of sixteen bytes or more")}
	keys, err := s.keys()
	if err != nil {
		b.Fatal(err)
	}
	o, _ := newOpener(keys)
	p, _ := newProofs(keys, nil, time.Hour)
	rec := wire.AppendMember(nil, channel.Member{ID: channel.UniqueID{1}, Host: netip.MustParseAddr("10.0.0.9"), Port: 4000, SecurePort: -1, UDPPort: -1})
	now := time.Now()
	sealed := p.seal(rec, now)
	b.Run("seal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			rec = p.seal(rec[:len(sealed)-minSeal], now)
		}
	})
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, reason := o.open(sealed); reason != "" {
				b.Fatal(reason)
			}
		}
	})
}
