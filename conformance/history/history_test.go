package history

import (
	"errors"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// With one processor, goroutines run in the same order nearly always.
func TestMain(m *testing.M) {
	runtime.GOMAXPROCS(1)
	goleak.VerifyTestMain(m)
}

func TestCheck(t *testing.T) {
	const s = time.Second
	swap := func(client int, from, to time.Duration, old, fresh string) Op {
		return Op{Client: client, Kind: Swap, Register: "a", Old: old, New: fresh, Call: from, Return: to}
	}
	read := func(from, to time.Duration, old string) Op {
		return Op{Client: 9, Kind: Read, Register: "a", Old: old, Call: from, Return: to}
	}
	add := func(client int, from, to time.Duration, sum string) Op {
		return Op{Client: client, Kind: Add, Register: "a", New: sum, Call: from, Return: to}
	}
	unknown := func(o Op) Op { o.Unknown = true; return o }
	for _, c := range []struct {
		name string
		ops  []Op
		good bool
	}{
		{"one after the other", []Op{swap(1, 0, s, "", "x"), swap(2, s+1, 2*s, "x", "y"), read(3*s, 4*s, "y")}, true},
		{"at the same time", []Op{swap(1, 0, 9*s, "y", "x"), swap(2, 0, 9*s, "", "y")}, true},
		{"a lost update", []Op{swap(1, 0, 9*s, "", "x"), swap(2, 0, 9*s, "", "y")}, false},
		{"an old value", []Op{swap(1, 0, s, "", "x"), read(2*s, 3*s, "")}, false},
		{"no answer, made", []Op{unknown(swap(1, 0, s, "", "x")), read(2*s, 3*s, ""), read(4*s, 5*s, "x")}, true},
		{"no answer, never made", []Op{unknown(swap(1, 0, s, "", "x")), read(2*s, 3*s, ""), swap(2, 4*s, 5*s, "", "y"), read(6*s, 7*s, "y")}, true},
		{"comes back", []Op{swap(1, 0, s, "", "x"), swap(2, 2*s, 3*s, "x", "y"), read(4*s, 5*s, "x")}, false},
		{"counted", []Op{add(1, 0, 9*s, "2"), add(2, 0, 9*s, "1"), read(9*s, 10*s, "2")}, true},
		{"counted once", []Op{add(1, 0, 9*s, "1"), add(2, 0, 9*s, "1")}, false},
		{"counted too late", []Op{unknown(add(1, 0, s, "")), add(2, 2*s, 3*s, "1"), read(4*s, 5*s, "2")}, true},
		{"counted twice", []Op{unknown(add(1, 0, s, "")), add(2, 2*s, 3*s, "1"), read(4*s, 5*s, "3")}, false},
		{"counted early", []Op{read(0, s, "1"), unknown(add(1, 2*s, 3*s, "")), add(2, 4*s, 5*s, "2")}, false},
		{"one of two counted", []Op{unknown(add(1, 0, s, "")), unknown(add(3, 6*s, 7*s, "")), add(2, 2*s, 3*s, "2"), read(8*s, 9*s, "2")}, true},
		{"the later one counted", []Op{unknown(add(1, 0, s, "")), add(2, 2*s, 3*s, "1"), unknown(add(3, 4*s, 5*s, "")), read(6*s, 7*s, "3")}, true},
		{"out of nothing", []Op{read(0, s, "z")}, false},
	} {
		err := Check(c.ops, 10*time.Second)
		if (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "client") {
			t.Errorf("%s: nothing for people: %v", c.name, err)
		}
	}
}

// Many requests without an answer are no trouble.
func TestManyUnknown(t *testing.T) {
	var ops []Op
	at := func(i int) time.Duration { return time.Duration(i) * time.Millisecond }
	n := 0
	for i := range 3000 {
		o := Op{Client: i % 7, Kind: Add, Register: "n", Call: at(i), Return: at(i + 5)}
		if i%10 == 3 {
			o.Unknown = true
			n += i / 10 % 2 // every other one took effect
		} else {
			n++
			o.New = strconv.Itoa(n)
		}
		ops = append(ops, o)
	}
	if err := Check(ops, time.Minute); err != nil {
		t.Errorf("%.500v", err)
	}
	ops[1500].New = ops[1400].New
	if err := Check(ops, time.Minute); err == nil || errors.Is(err, ErrUndecided) {
		t.Errorf("one sum twice: %.200v", err)
	}
}
