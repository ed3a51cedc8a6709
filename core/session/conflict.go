package session

import (
	"slices"
	"strconv"
	"sync"
	"time"
)

// maxConflicts bounds the conflicts that are listed; the oldest are forgotten.
const maxConflicts = 1000

// Conflict is one attribute that two nodes changed without seeing each other's
// change (see [Past]): one of the changes is lost. It shows no more than a prefix
// of the session's id.
type Conflict struct {
	// Time is when a node noticed.
	Time      time.Time `json:"time"`
	Context   string    `json:"context"`
	ID        string    `json:"id"`
	Attribute string    `json:"attribute"`
	// Kept and Lost are the two changes. Which of them is kept is decided in
	// the same way on all nodes.
	Kept Change `json:"kept"`
	Lost Change `json:"lost"`
}

// Change is the version of a change and the node that made it: the first half of
// its unique id, 16 hexadecimal digits.
type Change struct {
	Counter uint64 `json:"counter"`
	Node    string `json:"node"`
}

func changeOf(v Version) Change {
	digits := strconv.FormatUint(v.Node, 16)
	return Change{v.Counter, "0000000000000000"[len(digits):] + digits}
}

// Conflicts are the latest conflicts that one place has met. Its methods may be
// called concurrently.
type Conflicts struct {
	mu   sync.Mutex // the innermost
	list []dispute  // a ring once it is full
	next int
}

type dispute struct {
	key        Key
	attribute  string
	kept, lost Version
	at         int64
}

// Add notes a conflict that [Record.MergeEach] has told, at that time in
// milliseconds since 1970.
func (d *Conflicts) Add(key Key, attribute string, kept, lost Entry, at int64) {
	c := dispute{key, attribute, kept.Version, lost.Version, at}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.list) < maxConflicts {
		d.list = append(d.list, c)
		return
	}
	d.list[d.next] = c
	d.next = (d.next + 1) % maxConflicts
}

// List returns up to limit of the latest conflicts, the latest first.
func (d *Conflicts) List(limit int) []Conflict {
	d.mu.Lock()
	list := append(slices.Clone(d.list[d.next:]), d.list[:d.next]...)
	d.mu.Unlock()
	out := make([]Conflict, 0, min(len(list), max(limit, 0)))
	for _, c := range slices.Backward(list) {
		if len(out) >= limit {
			break
		}
		out = append(out, Conflict{
			Time: time.UnixMilli(c.at), Context: c.key.Context, ID: Prefix(c.key.ID), Attribute: c.attribute,
			Kept: changeOf(c.kept), Lost: changeOf(c.lost),
		})
	}
	return out
}

// JoinConflicts returns up to limit of what several places have met, the latest
// first, and each conflict once, with the time at which it was first noticed.
func JoinConflicts(limit int, lists ...[]Conflict) []Conflict {
	all := slices.Concat(lists...)
	slices.SortStableFunc(all, func(a, b Conflict) int { return a.Time.Compare(b.Time) })
	met := map[Conflict]bool{}
	all = slices.DeleteFunc(all, func(c Conflict) bool {
		c.Time = time.Time{}
		twice := met[c]
		met[c] = true
		return twice
	})
	slices.Reverse(all)
	return all[:min(len(all), max(limit, 0))]
}
