package table

import (
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/longhouse-go/longhouse/core/session"
)

// maxConflicts bounds the conflicts that are listed; the oldest are forgotten.
const maxConflicts = 1000

// Conflict is one attribute that two nodes changed without seeing each other's
// change: one of the changes is lost. It shows no more than a prefix of the id.
type Conflict struct {
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

func changeOf(v session.Version) Change {
	digits := strconv.FormatUint(v.Node, 16)
	return Change{v.Counter, "0000000000000000"[len(digits):] + digits}
}

// disputes are the latest conflicts. Its lock is the innermost.
type disputes struct {
	mu   sync.Mutex
	list []dispute // a ring once it is full
	next int
}

type dispute struct {
	key        session.Key
	attribute  string
	kept, lost session.Version
	at         int64
}

func (d *disputes) add(c dispute) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.list) < maxConflicts {
		d.list = append(d.list, c)
		return
	}
	d.list[d.next] = c
	d.next = (d.next + 1) % maxConflicts
}

// Conflicts lists up to limit of the latest conflicts that this node saw in
// sessions of its table, the latest first. Status counts all of them.
func (t *Table) Conflicts(limit int) []Conflict {
	d := &t.disputes
	d.mu.Lock()
	list := append(slices.Clone(d.list[d.next:]), d.list[:d.next]...)
	d.mu.Unlock()
	out := make([]Conflict, 0, min(len(list), max(limit, 0)))
	for _, c := range slices.Backward(list) {
		if len(out) >= limit {
			break
		}
		out = append(out, Conflict{
			Time: time.UnixMilli(c.at), Context: c.key.Context, ID: session.Prefix(c.key.ID), Attribute: c.attribute,
			Kept: changeOf(c.kept), Lost: changeOf(c.lost),
		})
	}
	return out
}
