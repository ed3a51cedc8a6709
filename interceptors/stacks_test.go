package interceptors_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/interceptors/dispatch"
	"github.com/longhouse-go/longhouse/interceptors/fragment"
	"github.com/longhouse-go/longhouse/interceptors/gzip"
	"github.com/longhouse-go/longhouse/interceptors/order"
	"github.com/longhouse-go/longhouse/interceptors/throughput"
	"github.com/longhouse-go/longhouse/interceptors/totalorder"
	"github.com/longhouse-go/longhouse/interceptors/zstd"
)

// makeLayer returns a layer of small pieces, so that all of it is used.
func makeLayer(t testing.TB, name string, pieces int) channel.Interceptor {
	t.Helper()
	must := func(l channel.Interceptor, err error) channel.Interceptor {
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	s := channel.Settings{}
	switch name {
	case "gzip":
		return must(gzip.New(gzip.Defaults, s))
	case "zstd":
		return must(zstd.New(zstd.Defaults, s))
	case "fragment":
		c := fragment.Defaults
		c.MaxSize = pieces
		return must(fragment.New(c, s))
	case "order":
		return must(order.New(order.Defaults, s))
	case "totalorder":
		return must(totalorder.New(totalorder.Defaults, s))
	case "dispatch":
		return must(dispatch.New(dispatch.Defaults, s))
	case "throughput":
		return must(throughput.New(throughput.Defaults, s))
	}
	t.Fatalf("no layer %q", name)
	return nil
}

// What stacks of Tomcat's layers make of a message is read by ours; where no
// compressor is part of it, ours make the same bytes.
func TestStackVectors(t *testing.T) {
	text, err := os.ReadFile("testdata/stacks.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Vectors []struct {
			Name   string
			Stack  []string
			Config struct{ MaxSize int }
			Input  struct {
				Options channel.Options
				BodyHex string
			}
			Output []struct {
				Destinations []string
				Options      channel.Options
				BodyHex      string
			}
		}
	}
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	names := map[string]string{"GzipInterceptor": "gzip", "FragmentationInterceptor": "fragment", "OrderInterceptor": "order"}
	members := map[string]channel.Member{"tcp://{127, 0, 0, 1}:4002": channeltest.Member(1), "tcp://{127, 0, 0, 1}:4003": channeltest.Member(2)}
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, v := range file.Vectors {
		t.Run(v.Name, func(t *testing.T) {
			var layers []channel.Interceptor
			for _, s := range v.Stack {
				layers = append(layers, makeLayer(t, names[s], v.Config.MaxSize))
			}
			e := channeltest.Embed(t, layers...)
			body := unhex(v.Input.BodyHex)
			var to []channel.Member
			for _, out := range v.Output {
				if m := members[out.Destinations[0]]; !slices.Contains(to, m) {
					to = append(to, m)
				}
			}
			id := channel.NewUniqueID()
			for _, out := range v.Output {
				if members[out.Destinations[0]] != to[0] {
					continue
				}
				if err := e.Receive(t.Context(), &channel.Message{ID: id, From: to[0], Options: out.Options, Body: unhex(out.BodyHex)}); err != nil {
					t.Fatal(err)
				}
			}
			if got := e.Top.Messages(); len(got) != 1 || !bytes.Equal(got[0].Body, body) || got[0].Options != v.Input.Options {
				t.Errorf("read as %v", got)
			}
			if err := e.Send(t.Context(), to, body, v.Input.Options); err != nil {
				t.Fatal(err)
			}
			sent := e.Bottom.Messages()
			if slices.Contains(v.Stack, "GzipInterceptor") {
				return
			}
			if len(sent) != len(v.Output) {
				t.Fatalf("%d messages sent, want %d", len(sent), len(v.Output))
			}
			for i, out := range v.Output {
				if m := sent[i]; !bytes.Equal(m.Body, unhex(out.BodyHex)) || m.Options != out.Options || m.To[0] != members[out.Destinations[0]] {
					t.Errorf("message %d to %v is %x with %v, want %s", i, m.To, m.Body, m.Options, out.BodyHex)
				}
			}
		})
	}
}

// wired are embedded channels of which each sends to the others.
type wired struct {
	nodes []*channeltest.Embedded
	made  []map[string]channel.Interceptor
}

type ender func(error)

func (e ender) Defer() func(error) { return e }

// connect makes channels with one layer of each name that any stack needs, and the
// first of the stacks.
func connect(t *testing.T, size int, stack []string) *wired {
	w := &wired{}
	for range size {
		w.made = append(w.made, map[string]channel.Interceptor{})
	}
	for i := range size {
		var layers []channel.Interceptor
		for _, name := range stack {
			layers = append(layers, w.layer(t, i, name))
		}
		w.nodes = append(w.nodes, channeltest.EmbedWith(t, channeltest.EmbedConfig{
			Layers: layers, Tick: 500 * time.Millisecond, Local: channel.Member{ID: channeltest.Member(i + 1).ID},
		}))
	}
	for i, n := range w.nodes {
		n.OnSend(func(ctx context.Context, m *channel.Message) error {
			for _, to := range m.To {
				j := slices.IndexFunc(w.nodes, func(n *channeltest.Embedded) bool { return n.Local().ID == to.ID })
				x := channeltest.Clone(m)
				x.To, x.From = nil, channeltest.Member(i+1)
				x.Later = ender(func(error) {})
				time.Sleep(time.Duration(len(x.Body)%5) * 100 * time.Microsecond)
				if err := w.nodes[j].Receive(ctx, &x); err != nil {
					return channel.Failed([]channel.Member{to}, err)
				}
			}
			return nil
		})
		for j := range w.nodes {
			if j != i {
				n.Observe(channel.MemberAdded, channeltest.Member(j+1))
			}
		}
	}
	synctest.Wait()
	return w
}

func (w *wired) layer(t *testing.T, node int, name string) channel.Interceptor {
	l := w.made[node][name]
	if l == nil {
		l = makeLayer(t, name, 100)
		w.made[node][name] = l
	}
	return l
}

func (w *wired) swap(t *testing.T, node int, stack []string) {
	t.Helper()
	var layers []channel.Layer
	for _, name := range stack {
		layers = append(layers, channel.Layer{Interceptor: w.layer(t, node, name)})
	}
	s, err := channel.NewStack(layers...)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.nodes[node].Swap(t.Context(), s); err != nil {
		t.Errorf("swap to %v: %v", stack, err)
	}
}

// orderedStacks keep the order of one sender, with the queue of dispatch above
// and below the others. In each group the layers that change bodies are the
// same, in the same order.
var orderedStacks = [][][]string{
	{
		{"dispatch", "gzip", "fragment", "order"},
		{"gzip", "dispatch", "fragment", "order"},
		{"gzip", "fragment", "order", "dispatch"},
		{"throughput", "dispatch", "gzip", "fragment", "order"},
	},
	{
		{"dispatch", "order", "fragment", "zstd"},
		{"order", "dispatch", "fragment", "zstd"},
		{"order", "fragment", "zstd", "throughput", "dispatch"},
	},
	{
		{"totalorder", "dispatch", "zstd", "fragment"},
		{"totalorder", "zstd", "fragment", "dispatch"},
		{"throughput", "totalorder", "zstd", "fragment", "dispatch"},
	},
	{
		{"totalorder", "order", "fragment", "gzip", "dispatch"},
		{"totalorder", "dispatch", "order", "fragment", "gzip"},
	},
}

// Two nodes send to each other, in every way, through stacks with and without a
// queue above them, while their layers change places: nothing is lost or
// doubled, and the order stays.
func TestOrderedStacksWhileTheyChange(t *testing.T) {
	for _, stacks := range orderedStacks {
		for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendSyncAck, channel.SendAsync, channel.SendAsync | channel.UseAck} {
			t.Run(fmt.Sprintf("%s/%v", strings.Join(stacks[0], "+"), o), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					const each = 150
					w := connect(t, 2, stacks[0])
					var want []string
					for k := range each {
						want = append(want, fmt.Sprintf("%d %s", k, strings.Repeat("body ", k%90)))
					}
					var senders sync.WaitGroup
					for i, n := range w.nodes {
						senders.Go(func() {
							to := []channel.Member{channeltest.Member(2 - i)}
							for k, body := range want {
								if err := n.Send(t.Context(), to, []byte(body), o); err != nil {
									t.Errorf("node %d, %d: %v", i, k, err)
								}
								time.Sleep(time.Duration(k%3) * time.Millisecond)
							}
						})
					}
					for s := range 12 {
						time.Sleep(7 * time.Millisecond)
						for i := range w.nodes {
							w.swap(t, i, stacks[(s+1)%len(stacks)])
						}
					}
					senders.Wait()
					time.Sleep(5 * time.Second)
					for i, n := range w.nodes {
						got := n.Top.Bodies()
						if slices.Equal(got, want) {
							continue
						}
						for k := range max(len(got), len(want)) {
							if k >= len(got) || k >= len(want) || got[k] != want[k] {
								t.Fatalf("node %d: %d of %d delivered, the %d. is not as sent", i, len(got), len(want), k)
							}
						}
					}
				})
			})
		}
	}
}

// Three nodes send to all others and to themselves while their layers change
// places: everybody sees everything, in one order.
func TestTotalOrderWhileTheStackChanges(t *testing.T) {
	for _, o := range []channel.Options{channel.SendNone, channel.SendAck, channel.SendAsync} {
		synctest.Test(t, func(t *testing.T) {
			const size, each = 3, 100
			stacks := orderedStacks[2]
			w := connect(t, size, stacks[0])
			var all []channel.Member
			for _, n := range w.nodes {
				all = append(all, n.Local())
			}
			var senders sync.WaitGroup
			for i, n := range w.nodes {
				senders.Go(func() {
					for k := range each {
						body := fmt.Sprintf("%d %d %s", i, k, strings.Repeat("body ", k%90))
						if err := n.Send(t.Context(), all, []byte(body), o); err != nil {
							t.Errorf("node %d, %d: %v", i, k, err)
						}
					}
				})
			}
			for s := range 10 {
				time.Sleep(5 * time.Millisecond)
				for i := range w.nodes {
					w.swap(t, i, stacks[(s+1)%len(stacks)])
				}
			}
			senders.Wait()
			time.Sleep(15 * time.Second)
			first := w.nodes[0].Top.Bodies()
			for i, n := range w.nodes {
				if got := n.Top.Bodies(); len(got) != size*each || !slices.Equal(got, first) {
					t.Errorf("options %v: node %d delivered %d of %d, same as the first: %t", o, i, len(got), size*each, slices.Equal(got, first))
				}
			}
		})
	}
}
