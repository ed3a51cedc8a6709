package peer_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/core"
)

// Two whole Tomcats replicate sessions with each other while a node of ours
// stands in their group: it sees them, they see it, it leaves alone what it
// does not know, and nobody complains.
func testTomcat(t *testing.T) {
	j := startJVM(t, "--add-opens=java.base/java.io=ALL-UNNAMED", "--add-opens=java.base/java.lang=ALL-UNNAMED",
		"--add-opens=java.rmi/sun.rmi.transport=ALL-UNNAMED") // or Tomcat warns when it stops
	g := newGroup(t, j)
	open := func(n int) (id string, at string) {
		name := fmt.Sprintf("tomcat-%d", n)
		r, err := j.Call(within(t), "webOpen", url.Values{
			"node": {name}, "route": {name}, "dir": {t.TempDir()}, "group": {g.address}, "groupPort": {fmt.Sprint(g.port)}, "port": {fmt.Sprint(channeltest.FreePort(t, "tcp"))},
			"frequency": {"100"}, "dropTime": {fmt.Sprint(g.drop.Milliseconds())},
		})
		if err != nil {
			t.Fatalf("%v\n%s", err, complaints(j))
		}
		return r.Get("id"), "http://127.0.0.1:" + r.Get("http") + "/app"
	}
	first, one := open(1)
	a := g.longhouse(func(c *nodeConfig) {
		c.reply = func(m *channel.Message) (bool, error) { return m.Options.Has(channel.ByteMessage), nil }
	})
	a.sees(first)
	second, two := open(2)
	a.sees(first, second)

	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Jar: jar, Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(url string) string {
		r, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for i := range 20 {
		get(fmt.Sprintf("%s?name=n&value=v%d", one, i))
	}
	poll(t, j, "the other Tomcat has the session", func() bool { return strings.HasSuffix(get(two+"?name=n"), " v19") })
	a.wait(a.got, "the session messages come to us, too", func() bool { return len(a.got.Messages()) >= 21 })
	for _, m := range a.got.Messages() {
		if m.Options.Has(channel.ByteMessage) || !strings.HasPrefix(string(m.Body), "\xac\xed\x00\x05") || !strings.Contains(string(m.Body), "SessionMessageImpl") {
			t.Errorf("not a session message: options %v, %.60q", m.Options, m.Body)
		}
	}
	// A message of ours that Tomcat does not know.
	if err := a.Send(within(t), a.View().Members, []byte("for somebody else"), channel.SendSyncAck); err != nil {
		t.Error(err)
	}
	for n := 2; n > 0; n-- {
		if _, err := j.Call(within(t), "webClose", url.Values{"node": {fmt.Sprintf("tomcat-%d", n)}}); err != nil {
			t.Errorf("stop of Tomcat %d: %v", n, err)
		}
	}
	a.sees()
	if text := complaints(j); text != "" {
		t.Errorf("Tomcat's log:\n%s", text)
	}
	if i := slices.IndexFunc(a.log(), func(l string) bool { return strings.HasPrefix(l, "warn") || strings.HasPrefix(l, "error") }); i >= 0 {
		t.Errorf("our log: %s", a.log()[i])
	}
}

// A whole Tomcat starts in a group whose oldest member is a node of ours. It asks
// that one for its sessions, is told that there are none, and serves at once
// instead of after a minute.
func testTomcatJoinsOurs(t *testing.T) {
	j := startJVM(t, "--add-opens=java.base/java.io=ALL-UNNAMED", "--add-opens=java.base/java.lang=ALL-UNNAMED",
		"--add-opens=java.rmi/sun.rmi.transport=ALL-UNNAMED")
	g := newGroup(t, j)
	a := g.longhouse(func(c *nodeConfig) {
		c.listen = func(ch *channel.Channel, s channel.Settings) { t.Cleanup(core.AnswerTomcat(ch, s)) }
		c.reply = func(m *channel.Message) (bool, error) { return m.Options.Has(channel.ByteMessage), nil }
	})
	start := time.Now()
	r, err := j.Call(within(t), "webOpen", url.Values{
		"node": {"tomcat"}, "route": {"tomcat"}, "dir": {t.TempDir()}, "group": {g.address}, "groupPort": {fmt.Sprint(g.port)}, "port": {fmt.Sprint(channeltest.FreePort(t, "tcp"))},
		"frequency": {"100"}, "dropTime": {fmt.Sprint(g.drop.Milliseconds())},
	})
	if err != nil {
		t.Fatalf("%v\n%s\nasked %v times; our log: %v", err, complaints(j), a.counter("tomcat_state_requests_total"), a.log())
	}
	t.Logf("Tomcat started in %v", time.Since(start).Round(time.Millisecond))
	a.sees(r.Get("id"))
	if n := a.counter("tomcat_state_requests_total"); n != 1 {
		t.Errorf("it asked %v times", n)
	}
	if text := complaints(j); strings.Contains(text, "timing out") {
		t.Errorf("Tomcat has waited in vain:\n%s", text)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:" + r.Get("http") + "/app?name=n&value=v")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Error(resp.Status)
	}
	if _, err := j.Call(within(t), "webClose", url.Values{"node": {"tomcat"}}); err != nil {
		t.Error(err)
	}
}
