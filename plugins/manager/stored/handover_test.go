package stored_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
	"github.com/longhouse-go/longhouse/plugins/manager/stored"
)

// What is in the store, and only that, is handed over.
func TestWhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newShelf()
		a := newNode(t, s, stored.Defaults(), 1)
		k, nobody := a.create("A"), session.Key{Context: "localhost/", ID: "none"}
		where := func() []core.Whereabouts {
			got, err := a.m.Where(t.Context(), core.WhereQuery{Keys: []session.Key{k, nobody}})
			if err != nil || got.Pages != 0 || len(got.Sessions) != 2 {
				t.Fatalf("%+v, %v", got, err)
			}
			if w := got.Sessions[1]; w.Key != nobody || w.Content != 0 || len(w.Holders) != 0 {
				t.Errorf("a session that is nowhere: %+v", w)
			}
			return got.Sessions
		}
		if w := where()[0]; !slices.Equal(w.Holders, []string{"store"}) || w.Content != a.live[k].Content() {
			t.Errorf("stored: %+v", w)
		}
		s.break_(errors.New("refused"))
		a.commit(a.change(k, "n", "1"), core.Async)
		if w := where()[0]; len(w.Holders) != 0 {
			t.Errorf("while the store fails: %+v", w)
		}
		s.break_(nil)
		time.Sleep(10 * time.Second)
		if w := where()[0]; !slices.Equal(w.Holders, []string{"store"}) || w.Content != a.live[k].Content() {
			t.Errorf("afterwards: %+v", w)
		}
	})
}
