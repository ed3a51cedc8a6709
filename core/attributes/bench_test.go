package attributes

import (
	"context"
	"testing"
)

// BenchmarkGet is what a request pays for reading an attribute.
func BenchmarkGet(b *testing.B) {
	a := Local("localhost/")
	if err := a.Set(context.Background(), "motd", "closed on Monday"); err != nil {
		b.Fatal(err)
	}
	const motd = Attr[string]("motd")
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := motd.Get(a); !ok || err != nil {
			b.Fatal(err)
		}
	}
}
