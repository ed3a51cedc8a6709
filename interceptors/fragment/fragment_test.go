package fragment

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

var a, b = channeltest.Member(1), channeltest.Member(2)

type fixture struct {
	*channeltest.Embedded
	layer   *Interceptor
	metrics *channel.Metrics
}

func start(t testing.TB, change func(*Config)) *fixture {
	t.Helper()
	f, m := channeltest.Made(t, Defaults, change, New)
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{f}, Tick: time.Second})
	return &fixture{e, f, m}
}

// value returns a metric; with a label's value, that of the one that has it.
func (f *fixture) value(name string, label ...string) float64 {
	return channeltest.Sum(f.metrics, name, label...)
}

// frag is one piece as it is on the wire.
func frag(body string, number, count int32) string {
	w := binary.BigEndian.AppendUint32([]byte(body), uint32(number))
	return string(append(binary.BigEndian.AppendUint32(w, uint32(count)), piece))
}

// receive hands one piece of message id to the bottom.
func (f *fixture) receive(from channel.Member, id channel.UniqueID, body string) error {
	return f.Receive(context.Background(), &channel.Message{ID: id, From: from, Options: channel.SendNone, Body: []byte(body)})
}

type vector struct {
	Name   string
	Config struct {
		OptionFlag channel.Options
		MaxSize    int
	}
	Input struct {
		Options channel.Options
		BodyHex string
	}
	Output []struct {
		Options channel.Options
		BodyHex string
	}
}

func vectors(t testing.TB) []vector {
	return channeltest.Vectors[vector](t, "testdata/vectors.json")
}

func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			f := start(t, func(c *Config) { c.MaxSize, c.OptionFlag = v.Config.MaxSize, v.Config.OptionFlag })
			body := channeltest.Unhex(t, v.Input.BodyHex)
			if err := f.Send(t.Context(), []channel.Member{a}, body, v.Input.Options); err != nil {
				t.Fatal(err)
			}
			sent := f.Bottom.Messages()
			if len(sent) != len(v.Output) {
				t.Fatalf("%d messages sent, want %d", len(sent), len(v.Output))
			}
			for i, out := range v.Output {
				if m := sent[i]; !bytes.Equal(m.Body, channeltest.Unhex(t, out.BodyHex)) || m.Options != out.Options || m.ID != sent[0].ID || m.Time != sent[0].Time {
					t.Errorf("message %d is %x, options %v, want %s", i, m.Body, m.Options, out.BodyHex)
				}
				if err := f.receive(a, sent[0].ID, string(channeltest.Unhex(t, out.BodyHex))); err != nil {
					t.Fatal(err)
				}
			}
			if got := f.Top.Messages(); len(got) != 1 || !bytes.Equal(got[0].Body, body) {
				t.Errorf("delivered %x", got)
			}
		})
	}
}

// Several messages in pieces, in any order, some twice, arrive whole and once.
func TestAnyOrderProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		f := start(t, func(c *Config) { c.MaxSize = rapid.IntRange(1, 50).Draw(r, "max size") })
		var want []string
		for i := range rapid.IntRange(1, 6).Draw(r, "messages") {
			body := strings.Repeat(fmt.Sprint(i), rapid.IntRange(0, 300).Draw(r, "size"))
			want = append(want, body)
			if err := f.Send(context.Background(), []channel.Member{a}, []byte(body), channel.SendAck); err != nil {
				r.Fatal(err)
			}
		}
		sent := f.Bottom.Messages()
		for _, i := range rapid.SliceOf(rapid.IntRange(0, len(sent)-1)).Draw(r, "again") {
			if m := sent[i]; m.Body[len(m.Body)-1] == piece {
				sent = append(sent, m)
			}
		}
		for _, m := range rapid.Permutation(sent).Draw(r, "order") {
			m.From, m.To, m.Options = b, nil, channel.SendNone
			_ = f.Receive(context.Background(), &m) // stray ones of an ended message are refused
		}
		got := f.Top.Bodies()
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			r.Fatalf("delivered %q, want %q", got, want)
		}
		if n := f.value("fragment_unfinished_bytes"); n != 0 {
			r.Fatalf("%v bytes are kept", n)
		}
	})
}

// Impossible numbers, counts and trailers are refused, counted once, and keep
// nothing.
func TestHostileNumbers(t *testing.T) {
	for name, x := range map[string]struct{ body, reason string }{
		"count -1":       {frag("x", 0, -1), "malformed"},
		"count 0":        {frag("x", 0, 0), "malformed"},
		"count max":      {frag("x", 0, 1<<31-1), "too_many"},
		"number = count": {frag("x", 5, 5), "malformed"},
		"number > count": {frag("x", 1<<31-1, 5), "malformed"},
		"number -1":      {frag("x", -1, 5), "malformed"},
		"number min":     {frag("x", -1<<31, 5), "malformed"},
		"no body":        {"", "malformed"},
		"short":          {"\x00\x00\x00\x00\x00\x00\x02\x01", "malformed"},
		"other trailer":  {"text", "malformed"},
	} {
		f := start(t, nil)
		err := f.receive(a, channel.NewUniqueID(), x.body)
		if !errors.Is(err, channel.ErrBadMessage) && !errors.Is(err, channel.ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
		if f.value("fragment_refused_total") != 1 || f.value("fragment_refused_total", x.reason) != 1 {
			t.Errorf("%s: %v counted, %v of them as %s", name, f.value("fragment_refused_total"), f.value("fragment_refused_total", x.reason), x.reason)
		}
		if n := f.value("fragment_unfinished_bytes"); n != 0 || len(f.Top.Messages()) > 0 {
			t.Errorf("%s: %v bytes kept, delivered %q", name, n, f.Top.Bodies())
		}
	}
}

func TestInconsistentPieces(t *testing.T) {
	f, id := start(t, nil), channel.NewUniqueID()
	for _, x := range []struct {
		body   string
		reason string
	}{
		{frag("a", 0, 3), ""},
		{frag("b", 1, 4), "mismatch"},
		{frag("other", 0, 3), "duplicate"},
		{frag("c", 2, 3), ""},
		{frag("b", 1, 3), ""},
		{frag("b", 1, 3), "ended"},
		{frag("a", 0, 2), "ended"},
	} {
		before := f.value("fragment_refused_total", x.reason)
		err := f.receive(a, id, x.body)
		if (err != nil) != (x.reason == "mismatch" || x.reason == "ended") {
			t.Errorf("%q: %v", x.body, err)
		}
		if x.reason != "" && f.value("fragment_refused_total", x.reason) != before+1 {
			t.Errorf("%q was not counted as %s", x.body, x.reason)
		}
	}
	if got := f.Top.Bodies(); !slices.Equal(got, []string{"abc"}) {
		t.Errorf("delivered %q", got)
	}
	// Another sender may use the same id.
	if err := errors.Join(f.receive(b, id, frag("x", 0, 2)), f.receive(b, id, frag("y", 1, 2))); err != nil || f.Top.Bodies()[1] != "xy" {
		t.Errorf("%v, %q", err, f.Top.Bodies())
	}
	// A message in one piece is legal.
	if err := f.receive(b, channel.NewUniqueID(), frag("one", 0, 1)); err != nil || f.Top.Bodies()[2] != "one" {
		t.Errorf("%v, %q", err, f.Top.Bodies())
	}
}

func TestExpiryAndLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		for _, m := range []channel.Member{a, b} {
			f.Observe(channel.MemberAdded, m)
		}
		kept := func(want float64) {
			t.Helper()
			synctest.Wait()
			if n := f.value("fragment_unfinished_messages"); n != want || (want == 0) != (f.value("fragment_unfinished_bytes") == 0) {
				t.Errorf("%v messages of %v bytes kept, want %v", n, f.value("fragment_unfinished_bytes"), want)
			}
		}
		id := channel.NewUniqueID()
		begin := func(m channel.Member) {
			t.Helper()
			if err := f.receive(m, id, frag("a", 0, 2)); err != nil {
				t.Fatal(err)
			}
		}
		begin(a)
		time.Sleep(59 * time.Second)
		begin(b)
		kept(2)
		time.Sleep(2 * time.Second)
		kept(1)
		if err := f.receive(a, id, frag("b", 1, 2)); !errors.Is(err, channel.ErrBadMessage) {
			t.Errorf("the rest of an expired message: %v", err)
		}
		f.Observe(channel.MemberLost, b)
		kept(0)
		f.Observe(channel.MemberAdded, b)
		begin(b)
		f.Observe(channel.MemberLeft, b)
		kept(1) // what is on its way may still come
		if err := f.receive(b, id, frag("b", 1, 2)); err != nil || !slices.Equal(f.Top.Bodies(), []string{"ab"}) {
			t.Errorf("the last piece came after the goodbye: %v, %q", err, f.Top.Bodies())
		}
		id = channel.NewUniqueID()
		begin(b)
		time.Sleep(4 * time.Second)
		kept(0)
		if n := f.value("fragment_expired_total"); n != 3 {
			t.Errorf("%v counted as expired", n)
		}
	})
}

func TestBounds(t *testing.T) {
	f := start(t, func(c *Config) {
		c.MaxSize, c.MaxMessageSize, c.MaxFragments = 100, 1000, 5
		c.SenderSize, c.SenderMessages, c.TotalSize, c.TotalMessages = 4000, 10, 6000, 12
	})
	id := channel.NewUniqueID()
	if err := f.receive(a, id, frag("x", 0, 6)); !errors.Is(err, channel.ErrTooLarge) {
		t.Errorf("too many pieces: %v", err)
	}
	if err := errors.Join(f.receive(a, id, frag(strings.Repeat("x", 600), 0, 3))); err != nil {
		t.Fatal(err)
	}
	if err := f.receive(a, id, frag(strings.Repeat("x", 600), 1, 3)); !errors.Is(err, channel.ErrTooLarge) || f.value("fragment_unfinished_messages") != 0 {
		t.Errorf("too large: %v", err)
	}
	if err := f.receive(a, id, frag("x", 2, 3)); !errors.Is(err, channel.ErrBadMessage) {
		t.Errorf("the rest of it: %v", err)
	}
	refused := func(from channel.Member) (n int) {
		for range 20 {
			if err := f.receive(from, channel.NewUniqueID(), frag("", 0, 2)); errors.Is(err, channel.ErrQueueFull) {
				n++
			}
		}
		return n
	}
	if n := refused(a); n != 14 { // 4000 bytes, 584 each
		t.Errorf("%d of 20 refused for one sender", n)
	}
	if n := refused(b); n != 16 { // what is left of 6000
		t.Errorf("%d of 20 refused for the second sender", n)
	}
	if n := f.value("fragment_unfinished_bytes"); n > 6000 {
		t.Errorf("%v bytes kept", n)
	}
	for _, body := range []int{501, 1001} { // 6 pieces; too large
		if err := f.Send(t.Context(), []channel.Member{a}, make([]byte, body), channel.SendAck); !errors.Is(err, channel.ErrTooLarge) {
			t.Errorf("%d bytes sent: %v", body, err)
		}
	}
	if len(f.Bottom.Messages()) > 0 || f.value("fragment_send_refused_total") != 2 {
		t.Errorf("%d messages sent", len(f.Bottom.Messages()))
	}
}

func TestSendersAreBounded(t *testing.T) {
	f := start(t, func(c *Config) { c.TotalMessages = 10000 })
	for i := range maxSenders + 100 {
		err := f.receive(channeltest.Member(i+1), channel.NewUniqueID(), frag("", 0, 2))
		if (err == nil) != (i < maxSenders) {
			t.Fatalf("sender %d: %v", i, err)
		}
	}
	f = start(t, nil)
	for i := range maxSenders + 100 { // all done with their messages
		if err := f.receive(channeltest.Member(i+1), channel.NewUniqueID(), frag("x", 0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(f.layer.store.senders); n > maxSenders {
		t.Errorf("%d senders remembered", n)
	}
}

// Ten thousand pieces a second of messages that never end, for twelve seconds.
func TestFloodOfUnfinishedMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, nil)
		body := frag(strings.Repeat("x", 1000), 0, 1000)
		base, most := heap(), int64(0)
		for second := range 12 {
			for i := range 10_000 {
				_ = f.receive(channeltest.Member(i%50+2), channel.NewUniqueID(), body)
			}
			if second%4 == 3 {
				most = max(most, heap()-base)
			}
			time.Sleep(time.Second)
		}
		if limit := int64(64 << 20); most > limit {
			t.Errorf("%d MiB were held", most>>20)
		}
		if n := f.value("fragment_unfinished_messages"); n > float64(Defaults.TotalMessages) {
			t.Errorf("%v messages kept", n)
		}
		time.Sleep(2 * time.Minute)
		if n := f.value("fragment_unfinished_bytes"); n != 0 {
			t.Errorf("%v bytes are left", n)
		}
		if err := errors.Join(f.receive(a, channel.UniqueID{1}, frag("go", 0, 2)), f.receive(a, channel.UniqueID{1}, frag("od", 1, 2))); err != nil || f.Top.Bodies()[0] != "good" {
			t.Errorf("after the flood: %v", err)
		}
	})
}

func heap() int64 {
	runtime.GC()
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc)
}

// All pieces travel with the options of their message, and its end is told once.
func TestDoneIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(c *Config) { c.MaxSize = 10 })
		f.Hold()
		r := new(channeltest.Recorder)
		if err := f.SendDone(t.Context(), []channel.Member{a, b}, make([]byte, 95), channel.SendSyncAck, r); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := len(f.Bottom.Messages()); n != 10 || len(r.Results()) != 0 {
			t.Fatalf("%d pieces sent, %d results", n, len(r.Results()))
		}
		for _, m := range f.Bottom.Messages() {
			if m.Options != channel.SendSyncAck || len(m.To) != 2 {
				t.Errorf("a piece with options %v to %v", m.Options, m.To)
			}
		}
		f.Finish(nil)
		synctest.Wait()
		if res := r.Results(); len(res) != 1 || res[0].Err != nil {
			t.Errorf("results %+v", res)
		}
	})
}

// What fails for a member in several pieces is one fault; the other member gets
// all pieces, the failed one no more.
func TestFaultsAreJoined(t *testing.T) {
	for _, o := range []channel.Options{channel.SendNone, channel.SendAck} {
		for _, done := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				f := start(t, func(c *Config) { c.MaxSize = 10 })
				f.OnSend(func(_ context.Context, m *channel.Message) error {
					if len(m.To) == 2 && m.Body[len(m.Body)-6] >= 2 { // from the third piece
						return channel.Failed(m.To[:1], channel.ErrAckTimeout)
					}
					return nil
				})
				r := new(channeltest.Recorder)
				to, body := []channel.Member{a, b}, make([]byte, 95)
				var err error
				if done {
					if err = f.SendDone(t.Context(), to, body, o, r); err == nil {
						synctest.Wait()
						if len(r.Results()) != 1 {
							t.Fatalf("%d results", len(r.Results()))
						}
						err = r.Results()[0].Err
					}
				} else {
					err = f.Send(t.Context(), to, body, o)
				}
				var se *channel.SendError
				if !errors.As(err, &se) || len(se.Faults) != 1 || se.Faults[0].Member != a || !errors.Is(err, channel.ErrAckTimeout) {
					t.Errorf("options %v, done %t: %v", o, done, err)
				}
				sent := f.Bottom.Messages()
				if len(sent) != 10 || len(sent[9].To) == 0 || sent[9].To[len(sent[9].To)-1] != b {
					t.Errorf("options %v, done %t: %d pieces sent", o, done, len(sent))
				}
			})
		}
	}
}

func TestAllFailed(t *testing.T) {
	f := start(t, func(c *Config) { c.MaxSize = 10 })
	f.OnSend(func(_ context.Context, m *channel.Message) error {
		return channel.Failed(m.To, channel.ErrDisconnected)
	})
	if err := f.Send(t.Context(), []channel.Member{a, b}, make([]byte, 95), channel.SendNone); !errors.Is(err, channel.ErrDisconnected) {
		t.Error(err)
	}
	if n := len(f.Bottom.Messages()); n != 1 {
		t.Errorf("%d pieces sent to members that failed at the first", n)
	}
}

// The error of the application answers the piece that completes the message.
func TestApplicationFails(t *testing.T) {
	f := start(t, nil)
	f.Top.Reply = func(*channel.Message) (bool, error) { return false, channel.ErrNotMember }
	id := channel.NewUniqueID()
	if err := f.receive(a, id, frag("x", 1, 2)); err != nil {
		t.Error(err)
	}
	if err := f.receive(a, id, frag("x", 0, 2)); !errors.Is(err, channel.ErrNotMember) {
		t.Error(err)
	}
}

func TestSenderGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := start(t, func(c *Config) { c.MaxSize = 10 })
		f.Hold()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := f.Send(ctx, []channel.Member{a, b}, make([]byte, 95), channel.SendAck)
		var se *channel.SendError
		if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &se) || len(se.Faults) != 2 {
			t.Errorf("%v", err)
		}
		f.Finish(nil)
		if err := f.Send(t.Context(), []channel.Member{a}, make([]byte, 95), channel.SendAck); err != nil {
			t.Error(err)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	f := start(t, func(c *Config) { c.MaxSize = 10 })
	f.OnSend(func(ctx context.Context, m *channel.Message) error {
		c := channeltest.Clone(m)
		c.From, c.To, c.Options = a, nil, channel.SendNone
		return f.Receive(ctx, &c)
	})
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := range 50 {
				o := []channel.Options{channel.SendNone, channel.SendAck}[i%2]
				if err := f.Send(t.Context(), []channel.Member{b}, []byte(strings.Repeat(fmt.Sprintf("<%d-%d>", w, i), i)), o); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, body := range f.Top.Bodies() {
		word := body[:strings.Index(body+">", ">")]
		if body != "" && (strings.Repeat(word+">", strings.Count(body, ">")) != body || seen[body]) {
			t.Fatalf("mixed up or doubled: %q", body)
		}
		seen[body] = true
	}
	if n := len(f.Top.Messages()); n != 800 {
		t.Errorf("%d of 800 delivered", n)
	}
}

func TestConfig(t *testing.T) {
	for word, change := range map[string]func(*Config){
		"max_size is 0":         func(c *Config) { c.MaxSize = 0 },
		"max_message_size is":   func(c *Config) { c.MaxMessageSize = 10 },
		"max_fragments is 0":    func(c *Config) { c.MaxFragments = 0 },
		"sender_size is":        func(c *Config) { c.SenderSize = c.MaxMessageSize },
		"sender_messages is 0":  func(c *Config) { c.SenderMessages = 0 },
		"total_size is":         func(c *Config) { c.TotalSize = c.SenderSize - 1 },
		"total_messages is":     func(c *Config) { c.TotalMessages = 1 },
		"expire is 0s":          func(c *Config) { c.Expire = 0 },
		"option_flag is 0x1800": func(c *Config) { c.OptionFlag = 0x1800 },
		"option_flag is 0x2":    func(c *Config) { c.OptionFlag = 2 },
	} {
		c := Defaults
		change(&c)
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

// FuzzReceive feeds pieces that the input describes; whatever they are, the
// books balance.
func FuzzReceive(f *testing.F) {
	for _, v := range vectors(f) {
		for _, out := range v.Output {
			f.Add(channeltest.Unhex(f, out.BodyHex), channeltest.Unhex(f, out.BodyHex))
		}
	}
	f.Add([]byte(frag("a", 0, 2)), []byte(frag("b", 1, 2)))
	f.Fuzz(func(t *testing.T, first, second []byte) {
		c := Defaults
		c.MaxSize, c.MaxMessageSize, c.SenderSize, c.TotalSize = 10, 1000, 5000, 5000
		x, err := New(c, channel.Settings{})
		if err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		for i, body := range [][]byte{first, second, first} {
			pc, err := parse(body)
			if err != nil {
				continue
			}
			full, _ := x.store.add(&channel.Message{ID: channel.UniqueID{1}, From: a, Body: body}, pc, now.Add(time.Duration(i)))
			if full != nil && len(full.body) > 1000 {
				t.Fatalf("%d bytes joined", len(full.body))
			}
		}
		if x.store.bytes < 0 || x.store.bytes > 5000 {
			t.Fatalf("%d bytes kept", x.store.bytes)
		}
		x.store.expire(now.Add(time.Hour))
		if x.store.bytes != 0 || x.store.count != 0 || len(x.store.senders) != 0 || x.store.oldest != nil || x.store.newest != nil {
			t.Fatalf("left over: %+v", x.store)
		}
	})
}

func BenchmarkFragment(bm *testing.B) {
	for _, size := range []int{128, 1024, 102400, 1 << 20} {
		f, err := New(Defaults, channel.Settings{})
		if err != nil {
			bm.Fatal(err)
		}
		e := channeltest.EmbedWith(bm, channeltest.EmbedConfig{Layers: []channel.Interceptor{f}, Discard: true})
		body := make([]byte, size)
		bm.Run(fmt.Sprintf("send/%d", size), func(bm *testing.B) {
			bm.ReportAllocs()
			bm.SetBytes(int64(size))
			for bm.Loop() {
				if err := e.Send(context.Background(), []channel.Member{a}, body, channel.SendAck); err != nil {
					bm.Fatal(err)
				}
			}
		})
		bm.Run(fmt.Sprintf("receive/%d", size), func(bm *testing.B) {
			var pieces [][]byte
			e.OnSend(func(_ context.Context, m *channel.Message) error {
				pieces = append(pieces, bytes.Clone(m.Body))
				return nil
			})
			if err := e.Send(context.Background(), []channel.Member{a}, body, channel.SendNone); err != nil {
				bm.Fatal(err)
			}
			e.OnSend(nil)
			m := channel.Message{From: a, Options: channel.SendNone}
			bm.ReportAllocs()
			bm.SetBytes(int64(size))
			for bm.Loop() {
				m.ID = channel.NewUniqueID()
				for _, p := range pieces {
					m.Body = p
					if err := e.Receive(context.Background(), &m); err != nil {
						bm.Fatal(err)
					}
				}
			}
		})
	}
}
