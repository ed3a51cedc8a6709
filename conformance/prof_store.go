package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/core/session"
)

// StoreSubject is a place for sessions. Its checks run in real time.
type StoreSubject interface {
	Subject
	// Store opens the place, as one more node does: what one has saved, all
	// others find. Checks use keys of their own, so the place may be in use.
	// The check closes the store.
	Store(t *T) (core.Store, error)
}

// The features of stores.
const (
	// FeatureListing: the store can say what it holds.
	FeatureListing = "listing"
	// FeatureDurable: what is saved is there after all nodes have gone.
	FeatureDurable = "durable"
)

type store struct {
	name     string
	open     func(t *T) (core.Store, error)
	features []string
}

// Store is the subject of a place for sessions.
func Store(name string, open func(t *T) (core.Store, error), features ...string) Subject {
	return &store{name, open, features}
}

// Describe implements Subject.
func (s *store) Describe() (Description, error) {
	return Description{Kind: ProfileStore, Name: s.name, Modes: []core.PluginMode{core.Direct}, Features: s.features}, nil
}

// Store implements StoreSubject.
func (s *store) Store(t *T) (core.Store, error) { return s.open(t) }

// place is an open store and the keys of one check.
type place struct {
	core.Store
	t *T
}

// place opens the subject's store; it is closed when the check ends.
func (t *T) place() place {
	t.Helper()
	s, ok := t.Subject.(StoreSubject)
	if !ok {
		t.Fatal("the subject is no store")
	}
	st, err := s.Store(t)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return place{st, t}
}

// key returns a key that nobody else uses.
func (p place) key() session.Key {
	return session.Key{Context: "localhost/conform", ID: session.NewID()}
}

// save stores data and returns the version.
func (p place) save(k session.Key, data string, expires time.Time, prev core.StoreVersion) core.StoreVersion {
	p.t.Helper()
	v, err := p.Save(p.t.Context(), k, core.StoreItem{Data: []byte(data), Expires: expires}, prev)
	if err != nil {
		p.t.Fatalf("save over version %q: %v", prev, err)
	}
	if v == "" {
		p.t.Fatal("save returned the version of no item")
	}
	p.t.Cleanup(func() { _ = p.Delete(context.Background(), k) })
	return v
}

// load returns what is stored.
func (p place) load(k session.Key) (core.StoreItem, bool) {
	p.t.Helper()
	it, ok, err := p.Load(p.t.Context(), k)
	if err != nil {
		p.t.Fatalf("load: %v", err)
	}
	return it, ok
}

// expect checks what is stored; "" for nothing.
func (p place) expect(k session.Key, when, data string) core.StoreItem {
	p.t.Helper()
	it, ok := p.load(k)
	switch {
	case data == "" && ok:
		p.t.Errorf("%s: %.40q is stored, want nothing", when, it.Data)
	case data != "" && !ok:
		p.t.Errorf("%s: nothing is stored, want %.40q", when, data)
	case data != "" && string(it.Data) != data:
		p.t.Errorf("%s: %.40q is stored (%d bytes), want %.40q (%d bytes)", when, it.Data, len(it.Data), data, len(data))
	}
	return it
}

// soon is an expiry that no check reaches.
func soon() time.Time { return time.Now().Add(time.Hour).Truncate(time.Millisecond) }

func checkStoreRoundTrip(t *T) {
	p := t.place()
	k := p.key()
	p.expect(k, "before the first save", "")
	at := soon()
	v := p.save(k, "one", at, "")
	it := p.expect(k, "after a save", "one")
	if !it.Expires.Equal(at) {
		t.Errorf("it expires %v, saved was %v", it.Expires, at)
	}
	v = p.save(k, "two", at, v)
	p.expect(k, "after another save", "two")
	it, _ = p.load(k)
	p.save(k, "three", time.Time{}, it.Version)
	if it = p.expect(k, "after a save over a loaded version", "three"); !it.Expires.IsZero() {
		t.Errorf("it expires %v, saved was never", it.Expires)
	}
	it.Data[0] = 'X'
	p.expect(k, "after the caller has changed what it had loaded", "three")
	_ = v
}

func checkStoreSwap(t *T) {
	p, other := t.place(), t.place()
	k := p.key()
	v := p.save(k, "one", soon(), "")
	conflict := func(what string, s place, prev core.StoreVersion) {
		t.Helper()
		if _, err := s.Save(t.Context(), k, core.StoreItem{Data: []byte("wrong"), Expires: soon()}, prev); !errors.Is(err, core.ErrStoreConflict) {
			t.Errorf("%s: %v, want ErrStoreConflict", what, err)
		}
	}
	conflict("save of a new item where one is", other, "")
	p.expect(k, "after a conflict", "one")
	it, _ := other.load(k)
	other.save(k, "two", soon(), it.Version)
	conflict("save over an old version", p, v)
	p.expect(k, "after a conflict", "two")
	it, _ = p.load(k)
	if err := p.Delete(t.Context(), k); err != nil {
		t.Fatalf("delete: %v", err)
	}
	conflict("save over a version that was deleted", other, it.Version)
	p.expect(k, "after a delete and a conflict", "")
	p.save(k, "three", soon(), "")
	conflict("save over the last version before a delete", other, it.Version)
	conflict("save over the first version before a delete", other, v)
	p.expect(k, "in the end", "three")
}

func checkStoreRace(t *T) {
	const nodes, each = 4, 10
	first := t.place()
	k := first.key()
	var wg sync.WaitGroup
	var mu sync.Mutex
	wins := 0
	for i := range nodes {
		p := t.place()
		wg.Go(func() {
			for n := 0; n < each; {
				it, _, err := p.Load(t.Context(), k)
				if err == nil {
					_, err = p.Save(t.Context(), k, core.StoreItem{Data: append(it.Data, 'a'+byte(i)), Expires: soon()}, it.Version)
				}
				switch {
				case err == nil:
					n++
					mu.Lock()
					wins++
					mu.Unlock()
				case !errors.Is(err, core.ErrStoreConflict):
					t.Errorf("node %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	it, _ := first.load(k)
	_ = first.Delete(t.Context(), k)
	if len(it.Data) != wins || wins != nodes*each {
		t.Errorf("%d saves succeeded, %d of them are in the item", wins, len(it.Data))
	}
	for i := range nodes {
		if n := bytes.Count(it.Data, []byte{'a' + byte(i)}); n != each {
			t.Errorf("%d of %d saves of node %d are in the item", n, each, i)
		}
	}
}

func checkStoreExpiry(t *T) {
	p := t.place()
	k, past, touched := p.key(), p.key(), p.key()
	at := time.Now().Add(t.Timeouts.Quiet * 5).Truncate(time.Millisecond)
	p.save(k, "short", at, "")
	p.save(touched, "kept", at, "")
	p.save(past, "over", time.Now().Add(-time.Minute), "")
	p.expect(past, "an item that expired before it was saved", "")
	if err := p.Touch(t.Context(), touched, soon()); err != nil {
		t.Fatalf("touch: %v", err)
	}
	t.Eventually(t.Timeouts.Event, func() error {
		if it, ok := p.load(k); ok {
			return fmt.Errorf("it is still there %v after its expiry: %q", time.Since(at), it.Data)
		}
		return nil
	})
	if time.Now().Before(at) {
		t.Errorf("an item was gone %v before its expiry", time.Until(at))
	}
	p.save(k, "again", soon(), "")
	p.expect(k, "a new item in the place of one that has expired", "again")
	if it := p.expect(touched, "an item that was touched in time", "kept"); time.Until(it.Expires) < time.Minute {
		t.Errorf("after a touch it expires %v", it.Expires)
	}
	if err := p.Touch(t.Context(), p.key(), soon()); err != nil {
		t.Errorf("touch of an item that does not exist: %v", err)
	}
}

func checkStoreDelete(t *T) {
	p, other := t.place(), t.place()
	k, kept := p.key(), p.key()
	p.save(k, "one", soon(), "")
	p.save(kept, "two", soon(), "")
	if err := other.Delete(t.Context(), k); err != nil {
		t.Fatalf("delete: %v", err)
	}
	p.expect(k, "after another node has deleted it", "")
	p.expect(kept, "another item", "two")
	if err := p.Delete(t.Context(), k); err != nil {
		t.Errorf("delete of an item that does not exist: %v", err)
	}
}

func checkStoreKeys(t *T) {
	p := t.place()
	id := session.NewID()
	keys := []session.Key{
		{Context: "localhost/a", ID: id}, {Context: "localhost/A", ID: id}, {Context: "localhost/a", ID: strings.ToLower(id)},
		{Context: "localhost", ID: "/a" + id}, {Context: "localhost/a" + id, ID: ""}, {Context: "", ID: "localhost/a" + id},
		{Context: "../../" + id, ID: "../../" + id}, {Context: "a\x00" + id, ID: "b"}, {Context: "a", ID: "\x00" + id + "b"},
		{Context: "*", ID: id}, {Context: "a b\r\nset c 0 0 1\r\n", ID: id + "\r\n"}, {Context: "'; drop table sessions; --", ID: id},
		{Context: strings.Repeat("ü", session.MaxContext/2), ID: id[:2] + strings.Repeat("F", session.MaxID-2)},
		{Context: "\xff\xfe", ID: id},
	}
	for i, k := range keys {
		p.save(k, fmt.Sprint("item ", i), soon(), "")
	}
	for i, k := range keys {
		it, ok := p.load(k)
		if want := fmt.Sprint("item ", i); !ok || string(it.Data) != want {
			t.Errorf("the key %.60q has %q, %v, want %q", k, it.Data, ok, want)
		}
	}
}

func checkStoreData(t *T) {
	p := t.place()
	r := t.Rand("data")
	for _, size := range []int{1, 255, 4096, 100_000, 900_000} {
		k := p.key()
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		p.save(k, string(data), soon(), "")
		p.expect(k, fmt.Sprintf("%d random bytes", size), string(data))
	}
	// What is too large for the store is refused as such: it works, after all.
	k := p.key()
	big := bytes.Repeat([]byte("x"), session.MaxSize)
	_, err := p.Save(t.Context(), k, core.StoreItem{Data: big, Expires: soon()}, "")
	switch {
	case err == nil:
		p.expect(k, "16 MiB", string(big))
		_ = p.Delete(context.Background(), k)
	case !errors.Is(err, core.ErrStoreRefused):
		t.Errorf("save of 16 MiB: %v, want success or ErrStoreRefused", err)
	}
}

func checkStoreCancel(t *T) {
	p := t.place()
	k := p.key()
	p.save(k, "one", soon(), "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	t.within("calls with a context that has ended", func() error {
		_, _, err1 := p.Load(ctx, k)
		_, err2 := p.Save(ctx, p.key(), core.StoreItem{Data: []byte("x"), Expires: soon()}, "")
		if err1 == nil || err2 == nil {
			return fmt.Errorf("load: %v, save: %v", err1, err2)
		}
		return nil
	})
	p.expect(k, "after calls that were cancelled", "one")
}

func checkStoreList(t *T) {
	p := t.place()
	var want []session.Key
	for range 5 {
		k := p.key()
		p.save(k, "x", soon(), "")
		want = append(want, k)
	}
	gone := p.key()
	p.save(gone, "x", time.Now().Add(-time.Minute), "")
	seen := map[session.Key]int{}
	if err := p.List(t.Context(), 1<<20, func(k session.Key) { seen[k]++ }); err != nil {
		t.Fatalf("list: %v", err)
	}
	for _, k := range want {
		if seen[k] != 1 {
			t.Errorf("an item was listed %d times", seen[k])
		}
	}
	if seen[gone] > 0 {
		t.Error("an item that has expired was listed")
	}
	n := 0
	if err := p.List(t.Context(), 3, func(session.Key) { n++ }); err != nil || n != 3 {
		t.Errorf("a list of 3 has %d items, %v", n, err)
	}
}

func checkStoreDurable(t *T) {
	s := t.Subject.(StoreSubject)
	k := place{t: t}.key()
	var v core.StoreVersion
	for i, want := range []string{"", "one", "two"} {
		st, err := s.Store(t)
		if err != nil {
			t.Fatalf("open: %v", err)
		}
		p := place{st, t}
		it, ok := p.load(k)
		if string(it.Data) != want || ok != (want != "") || ok && it.Version != v {
			t.Errorf("opened for the %d. time it has %q in version %q, want %q in version %q", i+1, it.Data, it.Version, want, v)
		}
		if i == 2 {
			_ = st.Delete(t.Context(), k)
		} else if v, err = st.Save(t.Context(), k, core.StoreItem{Data: []byte([]string{"one", "two"}[i]), Expires: soon()}, it.Version); err != nil {
			t.Errorf("save: %v", err)
		}
		if err := st.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}
}

func storeChecks() []Check {
	check := func(id, requirement, source string, run func(*T), features []string, mistakes ...string) Check {
		return Check{
			ID: "store/" + id, Profile: ProfileStore, Level: Must, Features: features,
			Requirement: requirement, Source: source, Run: run, Saboteurs: storeSaboteurs(mistakes...),
		}
	}
	return []Check{
		check("round-trip", "What was saved is loaded with its bytes, its expiry and its version.",
			"core: Store.Save, Store.Load", checkStoreRoundTrip, nil, mistakeNoExpiry, mistakeSharesBytes, mistakeForgets),
		check("compare-and-swap", "A save over another version than the present one changes nothing and is a conflict, also for an item that was deleted or is new.",
			"core: Store.Save, ErrStoreConflict", checkStoreSwap, nil, mistakeNoSwap, mistakeWritesConflicts, mistakeSameVersions),
		check("race", "Of saves over one version at the same time, by several nodes, exactly one succeeds.",
			"core: Store.Save", checkStoreRace, nil, mistakeLateSwap),
		check("expiry", "An item is there until it expires and not longer, and a touch moves that; then a new one may take its place.",
			"core: StoreItem.Expires, Store.Touch", checkStoreExpiry, nil, mistakeNeverExpires, mistakeNoTouch, mistakeTouchCreates, mistakeExpiredBlocks),
		check("delete", "A deleted item is gone for all nodes, and no other one.",
			"core: Store.Delete", checkStoreDelete, nil, mistakeKeeps, mistakeDeleteFails),
		check("keys", "Keys that differ in any byte name different items, whatever bytes they are.",
			"core: Store; hostile inputs SP-11", checkStoreKeys, nil, mistakeFoldsCase, mistakeJoinsKeys),
		check("data", "Any bytes are kept as they are; an item that is too large is refused as such.",
			"core: StoreItem.Data, ErrStoreRefused", checkStoreData, nil, mistakeText, mistakeTooLarge),
		check("cancel", "A call whose context has ended fails soon.",
			"core: Store", checkStoreCancel, nil, mistakeNoContext),
		check("list", "A list has every item once, none that has expired, and no more than were asked for.",
			"core: Store.List", checkStoreList, []string{FeatureListing}, mistakeListsExpired, mistakeListsAll),
		check("durable", "What was saved is there when all nodes have closed the store and one opens it again.",
			"declared feature", checkStoreDurable, []string{FeatureDurable}, mistakeVolatile),
	}
}

// The mistakes that a plainStore can make.
const (
	mistakeNoExpiry        = "loses the expiry"
	mistakeSharesBytes     = "hands out the bytes it keeps"
	mistakeForgets         = "forgets every second save"
	mistakeNoSwap          = "never looks at versions"
	mistakeWritesConflicts = "reports a conflict and writes all the same"
	mistakeSameVersions    = "counts versions from one again after a delete"
	mistakeLateSwap        = "compares first and swaps later"
	mistakeNeverExpires    = "never expires"
	mistakeNoTouch         = "does nothing on a touch"
	mistakeTouchCreates    = "fails a touch of nothing"
	mistakeExpiredBlocks   = "takes expired items for present ones in a save"
	mistakeKeeps           = "deletes nothing"
	mistakeDeleteFails     = "fails a delete of nothing"
	mistakeFoldsCase       = "does not tell upper from lower case"
	mistakeJoinsKeys       = "joins context and id"
	mistakeText            = "takes data for text"
	mistakeTooLarge        = "fails for large items as if it were down"
	mistakeNoContext       = "does not look at the context"
	mistakeListsExpired    = "lists what has expired"
	mistakeListsAll        = "lists everything whatever the limit"
	mistakeVolatile        = "forgets everything when it is closed"
)

func storeSaboteurs(mistakes ...string) []Saboteur {
	var list []Saboteur
	for _, m := range mistakes {
		list = append(list, Saboteur{Name: m, New: func() Subject { return plainStores(m) }})
	}
	return list
}

// plainStores is the subject of a store in memory with one mistake, or none.
func plainStores(mistake string) Subject {
	shared := &plainPlace{items: map[string]core.StoreItem{}}
	return Store("plain", func(*T) (core.Store, error) {
		return &plainStore{p: shared, mistake: mistake}, nil
	}, FeatureListing, FeatureDurable)
}

type plainPlace struct {
	mu    sync.Mutex
	items map[string]core.StoreItem // guarded by mu
	keys  map[string]session.Key    // guarded by mu
	n     int                       // guarded by mu
}

type plainStore struct {
	p       *plainPlace
	mistake string
}

func (s *plainStore) name(k session.Key) string {
	switch s.mistake {
	case mistakeFoldsCase:
		return strings.ToLower(fmt.Sprintf("%q %q", k.Context, k.ID))
	case mistakeJoinsKeys:
		return k.Context + k.ID
	}
	return fmt.Sprintf("%q %q", k.Context, k.ID)
}

func (s *plainStore) enter(ctx context.Context) error {
	if s.mistake == mistakeNoContext {
		return nil
	}
	return ctx.Err()
}

func (s *plainStore) present(name string) (core.StoreItem, bool) {
	it, ok := s.p.items[name]
	if ok && !it.Expires.IsZero() && !it.Expires.After(time.Now()) && s.mistake != mistakeNeverExpires {
		return core.StoreItem{}, false
	}
	return it, ok
}

func (s *plainStore) Load(ctx context.Context, key session.Key) (core.StoreItem, bool, error) {
	if err := s.enter(ctx); err != nil {
		return core.StoreItem{}, false, err
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	it, ok := s.present(s.name(key))
	if s.mistake != mistakeSharesBytes {
		it.Data = slices.Clone(it.Data)
	}
	return it, ok, nil
}

func (s *plainStore) Save(ctx context.Context, key session.Key, item core.StoreItem, prev core.StoreVersion) (core.StoreVersion, error) {
	if err := s.enter(ctx); err != nil {
		return "", err
	}
	if len(item.Data) >= session.MaxSize {
		if s.mistake == mistakeTooLarge {
			return "", errors.New("plain: too much")
		}
		return "", core.ErrStoreRefused
	}
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	name := s.name(key)
	have, ok := s.present(name)
	if s.mistake == mistakeExpiredBlocks {
		have, ok = s.p.items[name]
	}
	conflict := ok && have.Version != prev || !ok && prev != ""
	if s.mistake == mistakeLateSwap {
		s.p.mu.Unlock()
		time.Sleep(time.Millisecond)
		s.p.mu.Lock()
	}
	if conflict && s.mistake != mistakeNoSwap && s.mistake != mistakeWritesConflicts {
		return "", core.ErrStoreConflict
	}
	s.p.n++
	n := s.p.n
	if s.mistake == mistakeSameVersions {
		n = 1
		if _, err := fmt.Sscan(string(have.Version), &n); err == nil {
			n++
		}
	}
	item.Version, item.Data = core.StoreVersion(fmt.Sprint(n)), slices.Clone(item.Data)
	switch {
	case s.mistake == mistakeNoExpiry:
		item.Expires = time.Time{}
	case s.mistake == mistakeText:
		item.Data = []byte(strings.ToValidUTF8(string(item.Data), "?"))
	}
	if s.mistake != mistakeForgets || n%2 == 1 {
		s.p.items[name] = item
		if s.p.keys == nil {
			s.p.keys = map[string]session.Key{}
		}
		s.p.keys[name] = key
	}
	if conflict && s.mistake == mistakeWritesConflicts {
		return "", core.ErrStoreConflict
	}
	return item.Version, nil
}

func (s *plainStore) Touch(_ context.Context, key session.Key, expires time.Time) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	it, ok := s.present(s.name(key))
	switch {
	case s.mistake == mistakeNoTouch:
	case ok:
		it.Expires = expires
		s.p.items[s.name(key)] = it
	case s.mistake == mistakeTouchCreates:
		return errors.New("plain: no such item")
	}
	return nil
}

func (s *plainStore) Delete(_ context.Context, key session.Key) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	_, ok := s.p.items[s.name(key)]
	if !ok && s.mistake == mistakeDeleteFails {
		return errors.New("plain: no such item")
	}
	if s.mistake != mistakeKeeps {
		delete(s.p.items, s.name(key))
	}
	return nil
}

func (s *plainStore) List(_ context.Context, limit int, each func(session.Key)) error {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	for name := range s.p.items {
		if _, ok := s.present(name); !ok && s.mistake != mistakeListsExpired {
			continue
		}
		if limit--; limit < 0 && s.mistake != mistakeListsAll {
			break
		}
		each(s.p.keys[name])
	}
	return nil
}

func (s *plainStore) Close() error {
	if s.mistake == mistakeVolatile {
		s.p.mu.Lock()
		defer s.p.mu.Unlock()
		clear(s.p.items)
	}
	return nil
}
