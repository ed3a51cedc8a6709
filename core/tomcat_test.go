package core

import (
	"context"
	"testing"
	"testing/synctest"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest"
	"github.com/longhouse-go/longhouse/channel/wire/jser"
)

// A Tomcat that asks for sessions is told that there are none, by one message and
// as a Tomcat would say it; everything else is left to others, and a flood of
// questions is bounded.
func TestAnswerTomcat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := channeltest.Embed(t)
		a := newTomcatAnswerer(e.Channel, channel.Settings{Metrics: channel.NewMetrics()})
		defer a.stop()
		text := func(s string) *string { return &s }
		encode := func(v jser.Value) []byte {
			b, err := jser.Encode(v)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		ask := encode(&jser.SessionMessage{Event: jser.SessionGetAll, Context: text("localhost#/app"), SessionID: text("GET-ALL"), UniqueID: text("GET-ALL-x")})
		from := channeltest.Member(2)
		e.Observe(channel.MemberAdded, from)
		synctest.Wait()
		give := func(o channel.Options, body []byte) bool {
			taken, err := a.Handle(t.Context(), &channel.Message{From: from, Options: o, Body: body})
			if err != nil {
				t.Error(err)
			}
			return taken
		}
		for name, body := range map[string][]byte{
			"nothing": nil, "no Java": []byte("x"), "cut off": ask[:len(ask)-3], "only a head": ask[:5], "another object": encode("text"),
			"too long": append(ask[:len(ask):len(ask)], make([]byte, maxStateRequest)...),
			"a delta":  encode(&jser.SessionMessage{Event: jser.SessionDelta, Context: text("localhost#/app")}),
		} {
			if give(0, body) {
				t.Errorf("%s was taken", name)
			}
		}
		if give(channel.ByteMessage, ask) {
			t.Error("bytes of somebody were taken")
		}
		if !give(0, ask) || a.asked.Value() != 1 {
			t.Error("the question was not taken")
		}
		synctest.Wait()
		sent := e.Bottom.Messages()
		if len(sent) != 1 || sent[0].Options.Has(channel.ByteMessage) {
			t.Fatalf("%+v", sent)
		}
		v, err := jser.Decode(sent[0].Body, jser.Limits{})
		if m, ok := v.(*jser.SessionMessage); err != nil || !ok || m.Event != jser.SessionNoContextManager || *m.Context != "localhost#/app" {
			t.Errorf("%+v, %v", v, err)
		}
		e.OnSend(func(ctx context.Context, _ *channel.Message) error { <-ctx.Done(); return ctx.Err() })
		for range 2 * maxStateAnswers {
			give(0, ask)
		}
		synctest.Wait()
		if n := len(e.Bottom.Messages()); n != 1+maxStateAnswers {
			t.Errorf("%d answers at once", n-1)
		}
	})
}
