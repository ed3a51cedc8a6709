package repmap

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/channel/channeltest/grouptest"
)

// BenchmarkPut measures a write that the other member has confirmed, between two
// nodes of this process.
func BenchmarkPut(b *testing.B) {
	for _, lazy := range []bool{false, true} {
		b.Run(map[bool]string{false: "full", true: "lazy"}[lazy], func(b *testing.B) {
			book := new(grouptest.Book)
			c := DefaultConfig()
			c.Lazy = lazy
			nodes := []*one{mapOn(b, book.JoinReal(b, "a"), c), mapOn(b, book.JoinReal(b, "b"), c)}
			met := make(chan struct{}, 1)
			cancel := nodes[0].Watch(func(v channel.View, _ channel.MemberEvent) {
				if len(v.Members) > 0 {
					select {
					case met <- struct{}{}:
					default:
					}
				}
			})
			<-met
			cancel()
			<-nodes[0].m.Ready()
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if err := nodes[0].m.Put(context.Background(), fmt.Sprint("k", i%1000), strings.Repeat("v", 100)+fmt.Sprint(i)); err != nil {
					b.Fatal(err)
				}
				i++
			}
			for _, n := range nodes {
				n.end(b)
			}
		})
	}
}

// BenchmarkGet measures reading a value that is here.
func BenchmarkGet(b *testing.B) {
	n := mapOn(b, new(grouptest.Book).JoinReal(b, "a"), DefaultConfig())
	if err := n.m.Put(context.Background(), "k", "v"); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := n.m.Get(context.Background(), "k"); !ok || err != nil {
			b.Fatal(err)
		}
	}
	n.end(b)
}
