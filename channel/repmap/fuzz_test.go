package repmap

import (
	"bytes"
	"testing"

	"github.com/longhouse-go/longhouse/channel"
)

func FuzzMessage(f *testing.F) {
	id := channel.UniqueID{1, 2, 3}
	for _, m := range []message{
		{Op: opPut, Records: []record{{Key: "k", Stamp: stamp{Counter: 1, Writer: id, Primary: id}, Backups: []channel.UniqueID{id}, Has: true, Value: []byte("v")}}},
		{Op: opPut, Lazy: true, Records: []record{{Key: "k", Stamp: stamp{Counter: 1}, Deleted: true, Age: 7}}},
		{Op: opDigest, Digests: make([]uint64, parts)},
		{Op: opList, Parts: []int{1, 255}, After: "x", Next: true, Part: 255},
		{Op: opGet, Keys: []string{"a", "b"}},
		{Op: opStop},
	} {
		b, err := encode(&m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		once, err := encode(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := decode(once)
		if err != nil {
			t.Fatalf("%v\nin  %x\nout %x", err, b, once)
		}
		twice, err := encode(again)
		if err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%v\nonce  %x\ntwice %x", err, once, twice)
		}
	})
}
