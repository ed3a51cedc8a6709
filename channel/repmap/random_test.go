package repmap

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestRandom does anything in any order: writes, removals, claims, joins,
// graceful leaves, crashes, splits and loss of packets. Then, after quiet, the
// invariant holds, nothing that was removed is back, and as long as nobody has
// crashed nothing that was written is lost.
func TestRandom(t *testing.T) {
	seeds := 5
	if testing.Short() {
		seeds = 2
	}
	kinds(func(t *testing.T, c Config) {
		for seed := range uint64(seeds) {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				run(t, c, 3, func(t *testing.T, w *world) { random(t, w, seed) })
			})
		}
	}, t)
}

func random(t *testing.T, w *world, seed uint64) {
	defer func() {
		if t.Failed() {
			t.Logf("the seed was %d", seed)
		}
	}()
	r := rand.New(rand.NewPCG(seed, 1))
	ctx := t.Context()
	crashes := seed%2 == 1
	top := map[string]stamp{} // the greatest stamp that was ever made
	gone := map[string]bool{} // whether that is a removal
	note := func(o *one, key string) {
		k, _ := o.m.k.Encode(key)
		o.m.e.mu.Lock()
		x := o.m.e.get(string(k))
		o.m.e.mu.Unlock()
		if x != nil && x.Stamp.compare(top[key]) > 0 {
			top[key], gone[key] = x.Stamp, x.Deleted
		}
	}
	crashed := false
	for range 150 {
		alive := w.alive()
		o := alive[r.IntN(len(alive))]
		key := fmt.Sprint("k", r.IntN(12))
		switch n := r.IntN(100); {
		case n < 50:
			_ = o.m.Put(ctx, key, fmt.Sprint("v", r.IntN(1000)))
			note(o, key)
		case n < 60:
			_, _ = o.m.Delete(ctx, key)
			note(o, key)
		case n < 70:
			_, _, _ = o.m.Claim(ctx, key)
			note(o, key)
		case n < 80:
			go func() { _ = o.m.Put(ctx, key, "concurrent") }()
			_ = alive[r.IntN(len(alive))].m.Put(ctx, key, fmt.Sprint("v", r.IntN(1000)))
			synctest.Wait()
			for _, x := range alive {
				note(x, key)
			}
		case n < 84 && len(alive) < 5:
			w.join()
		case n < 88 && len(alive) > 2:
			w.heal() // who leaves a split takes along what only it has
			w.quiet()
			o.end(t)
		case n < 90 && len(alive) > 2 && crashes:
			crashed = true
			o.crash(t, w.book)
		case n < 95:
			cut := 1 + r.IntN(len(alive))
			r.Shuffle(len(alive), func(i, j int) { alive[i], alive[j] = alive[j], alive[i] })
			w.split(alive[:cut], alive[cut:])
		default:
			w.heal()
		}
		time.Sleep(time.Duration(r.IntN(2000)) * time.Millisecond)
	}
	w.heal()
	w.quiet()
	w.verify()
	for key, s := range top {
		p, ok := w.alive()[0].m.Where(key)
		switch {
		case ok && gone[key] && p.Version <= s.Counter:
			t.Errorf("%q is back: %+v", key, p)
		case !crashed && !gone[key] && !ok:
			t.Errorf("%q is lost", key)
		case !crashed && ok && (p.Version < s.Counter || p.Version == s.Counter && p.Writer != s.Writer):
			t.Errorf("%q is %+v, a later write was %+v", key, p, s)
		}
	}
}
