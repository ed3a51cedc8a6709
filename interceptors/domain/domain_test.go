package domain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
)

// of returns member n of a domain.
func of(n int, domain string) channel.Member {
	m := channeltest.Member(n)
	m.Domain = domain
	return m
}

func embed(t *testing.T, c Config, local string) (*channeltest.Embedded, *channel.Metrics, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	s := channel.Settings{Metrics: channel.NewMetrics(), Logger: zap.New(core)}
	d, err := New(c, s)
	if err != nil {
		t.Fatal(err)
	}
	e := channeltest.EmbedWith(t, channeltest.EmbedConfig{Layers: []channel.Interceptor{d}, Settings: s, Local: channel.Member{Domain: local}})
	return e, s.Metrics, logs
}

func refused(m *channel.Metrics) float64 {
	for _, s := range m.Samples() {
		if s.Name == "domain_refused_total" {
			return s.Value
		}
	}
	return -1
}

func TestOnlyTheDomainIsSeen(t *testing.T) {
	tests := []struct{ config, local, passes string }{
		{"", "", ""},
		{"", "a", "a"},
		{"", "\x01\xfd", "\x01\xfd"},
		{"a", "", "a"},
		{"b", "a", "b"},
		{"{}", "a", ""},
		{"{97}", "", "a"},
		{" { 1, 2 ,-3 } ", "", "\x01\x02\xfd"},
	}
	domains := []string{"", "a", "b", "aa", "\x01\xfd", "\x01\x02\xfd"}
	for _, x := range tests {
		synctest.Test(t, func(t *testing.T) {
			e, metrics, _ := embed(t, Config{Domain: x.config}, x.local)
			var want []string
			for i, d := range domains {
				e.Observe(channel.MemberAdded, of(i+1, d))
				err := e.ReceiveBody(of(i+1, d), channel.SendAck, d)
				if (err == nil) != (d == x.passes) || err != nil && !errors.Is(err, channel.ErrNotMember) {
					t.Errorf("domain %q of %+v: %v", d, x, err)
				}
				if d == x.passes {
					want = append(want, d)
				}
			}
			synctest.Wait()
			var seen []string
			for _, m := range e.View().Members {
				seen = append(seen, m.Domain)
			}
			if !slices.Equal(seen, want) || !slices.Equal(e.Top.Bodies(), want) || len(want) != 1 {
				t.Errorf("%+v: members of %q seen, messages of %q", x, seen, e.Top.Bodies())
			}
			if n := refused(metrics); n != float64(len(domains)-1) {
				t.Errorf("%+v: %v refused", x, n)
			}
			if n := len(e.Top.Views()); n != 2 {
				t.Errorf("%+v: %d changes of the view", x, n)
			}
		})
	}
}

// A member that changes its domain comes or goes.
func TestMemberChangesDomain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _, _ := embed(t, Config{Domain: "a"}, "a")
		for _, d := range []string{"b", "a", "b", "a"} {
			e.Observe(channel.MemberUpdated, of(1, d))
			synctest.Wait()
			if got := e.View().Has(of(1, "")); got != (d == "a") {
				t.Errorf("with domain %q: in view %t", d, got)
			}
		}
		e.Observe(channel.MemberLeft, of(1, "a"))
		synctest.Wait()
		if len(e.View().Members) != 0 {
			t.Error("still there")
		}
	})
}

// Ten channels with ten domains, each told of all the others, see nobody.
func TestTenDomainsSeeNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for i := range 10 {
			e, _, _ := embed(t, Defaults, fmt.Sprint("domain", i))
			for j := range 10 {
				if j != i {
					e.Observe(channel.MemberAdded, of(j+1, fmt.Sprint("domain", j)))
				}
			}
			synctest.Wait()
			if len(e.View().Members) != 0 || len(e.Top.Views()) != 1 {
				t.Errorf("channel %d sees %v", i, e.View().Members)
			}
		}
	})
}

func TestLog(t *testing.T) {
	e, metrics, logs := embed(t, Config{Domain: "own", LogInterval: 10}, "own")
	for range 35 {
		if e.ReceiveBody(of(1, "\x1b[31m"+strings.Repeat("x", 100)), 0, "") == nil {
			t.Fatal("not refused")
		}
	}
	all := logs.All()
	if len(all) != 4 || refused(metrics) != 35 {
		t.Fatalf("%d lines, %v refused", len(all), refused(metrics))
	}
	if d := all[0].ContextMap()["its_domain"].(string); strings.ContainsRune(d, 0x1b) || len(d) > 80 {
		t.Errorf("the foreign domain is logged as %q", d)
	}
	e, _, logs = embed(t, Config{Domain: "own"}, "own")
	_ = e.ReceiveBody(of(1, "x"), 0, "")
	if logs.Len() > 0 {
		t.Error("logged although nobody asked for it")
	}
}

func TestFilterProperty(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		names := rapid.SliceOfDistinct(rapid.StringN(0, 3, 8), func(s string) string { return s }).Draw(r, "domains")
		domain := rapid.SampledFrom(append(names, "")).Draw(r, "local")
		d, err := New(Defaults, channel.Settings{})
		if err != nil {
			r.Fatal(err)
		}
		var in []channel.Member
		var want []channel.Member
		for i := range rapid.IntRange(0, 20).Draw(r, "members") {
			m := of(i+1, rapid.SampledFrom(append(names, "")).Draw(r, "domain"))
			in = append(in, m)
			if m.Domain == domain {
				want = append(want, m)
			}
		}
		v := channel.NewView(3, of(100, domain), slices.Clone(in))
		out := d.FilterView(v)
		if !slices.Equal(out.Members, want) || !slices.Equal(v.Members, in) || out.Local != v.Local {
			r.Fatalf("%v became %v", in, out)
		}
	})
}

func TestConfig(t *testing.T) {
	for word, c := range map[string]Config{
		"log_interval is -1": {LogInterval: -1},
		"not plain ASCII":    {Domain: "größe"},
		"add a }":            {Domain: "{1,2"},
		`"128" is no signed`: {Domain: "{1,128}"},
		`"" is no signed`:    {Domain: "{1,,2}"},
		`"x" is no signed`:   {Domain: "{x}"},
		"must have at most":  {Domain: strings.Repeat("x", maxDomain+1)},
	} {
		if _, err := New(c, channel.Settings{}); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "{}", "{1,2,-3}", "text", "{", "{ 1 }"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parse(s)
		if err == nil && len(d) > len(s) {
			t.Errorf("%q became %q", s, d)
		}
	})
}

func BenchmarkDomain(b *testing.B) {
	for _, c := range []Config{{Domain: "own"}, {}} {
		d, err := New(c, channel.Settings{})
		if err != nil {
			b.Fatal(err)
		}
		e := channeltest.EmbedWith(b, channeltest.EmbedConfig{Layers: []channel.Interceptor{d}, Local: channel.Member{Domain: "own"}, Discard: true})
		for _, from := range []string{"own", "foreign"} {
			b.Run(fmt.Sprintf("receive/%s/configured=%t", from, c.Domain != ""), func(b *testing.B) {
				b.ReportAllocs()
				m := channel.Message{From: of(1, from), Options: channel.SendNone, Body: make([]byte, 1024)}
				for b.Loop() {
					if err := e.Receive(context.Background(), &m); (err == nil) != (from == "own") {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
