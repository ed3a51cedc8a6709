package jser

// Session is the state of one Tomcat session, as it is in an event of all
// sessions and in a DeltaSession. Times are in milliseconds since 1970.
type Session struct {
	// ID is null only in a broken session.
	ID                              *string
	Created, Accessed, ThisAccessed int64
	// MaxInactive is in seconds; -1 means for ever.
	MaxInactive  int32
	New, Valid   bool
	Version      int64
	HasPrincipal bool
	Principal    Value
	// IDNote is the session id that the authenticator expects, or nil.
	IDNote Value
	// SavedRequest is what form authentication keeps, or nil.
	SavedRequest Value
	Attributes   []Attribute
	Listeners    []Value
	// NoNotes says that the writer left out the two notes, as old ones do.
	NoNotes bool
}

// Attribute is one attribute of a [Session].
type Attribute struct {
	Name  string
	Value Value
}

// Kinds of an [Action].
const (
	DeltaAttribute int32 = iota
	DeltaPrincipal
	DeltaIsNew
	DeltaMaxInterval
	DeltaAuthType
	DeltaListener
	DeltaNote
)

// Names of the actions that are no attribute or note.
const (
	NamePrincipal   = "__SET__PRINCIPAL__"
	NameIsNew       = "__SET__ISNEW__"
	NameMaxInterval = "__SET__MAXINTERVAL__"
	NameAuthType    = "__SET__AUTHTYPE__"
	NameListener    = "__SET__LISTENER__"
)

// Action is one change of a session.
type Action struct {
	// Kind is one of the Delta constants.
	Kind   int32
	Remove bool
	Name   string
	// HasValue tells a null value from none.
	HasValue bool
	Value    Value
}

// DeltaRequest is what a Tomcat session has changed.
type DeltaRequest struct {
	SessionID string
	RecordAll bool
	Actions   []Action
}

// open reads a stream of free items.
func openStream(b []byte, l Limits) (*source, error) {
	items, err := Parse(b, l)
	if err != nil {
		return nil, err
	}
	return &source{items: items}, nil
}

func (s *source) end(n int) error {
	s.rest()
	if s.bad {
		return &Error{ErrShape, n, ""}
	}
	return nil
}

// DecodeDelta reads a delta: the payload of a SessionDelta, or the diff of a
// map message. An unknown kind of action is left to the caller; unknown verbs
// are refused.
func DecodeDelta(b []byte, l Limits) (*DeltaRequest, error) {
	s, err := openStream(b, l)
	if err != nil {
		return nil, err
	}
	d := &DeltaRequest{SessionID: s.utf(), RecordAll: s.flag()}
	for range s.count() {
		a := Action{Kind: s.i32()}
		switch s.i32() {
		case 0:
		case 1:
			a.Remove = true
		default:
			s.bad = true
		}
		a.Name = s.utf()
		if a.HasValue = s.flag(); a.HasValue {
			a.Value = s.next()
		}
		if s.bad {
			break
		}
		d.Actions = append(d.Actions, a)
	}
	if err := s.end(len(b)); err != nil {
		return nil, err
	}
	return d, nil
}

// EncodeDelta writes a delta.
func (d *Dialect) EncodeDelta(q *DeltaRequest) ([]byte, error) {
	var s sink
	s.utf(q.SessionID)
	s.flag(q.RecordAll)
	s.i32(int32(len(q.Actions)))
	for _, a := range q.Actions {
		s.i32(a.Kind)
		verb := int32(0)
		if a.Remove {
			verb = 1
		}
		s.i32(verb)
		s.utf(a.Name)
		s.flag(a.HasValue)
		if a.HasValue {
			s.value(a.Value)
		}
	}
	return s.format(d)
}

// session reads the state of one session.
func (s *source) session() (x Session) {
	x.Created = take[int64](s)
	x.Accessed = take[int64](s)
	x.MaxInactive = take[int32](s)
	x.New = take[bool](s)
	x.Valid = take[bool](s)
	x.ThisAccessed = take[int64](s)
	x.Version = take[int64](s)
	if x.HasPrincipal = s.flag(); x.HasPrincipal {
		x.Principal = s.next()
	}
	if id := s.next(); id != nil {
		t, ok := id.(string)
		if !ok {
			s.bad = true
		}
		x.ID = &t
	}
	note := s.next()
	n, old := note.(int32)
	if x.NoNotes = old; !old {
		x.IDNote = note
		x.SavedRequest = s.next()
		n = take[int32](s)
	}
	if n < 0 {
		s.bad = true
	}
	for i := int32(0); i < n && !s.bad; i++ {
		a := Attribute{Name: take[string](s)}
		a.Value = s.next()
		x.Attributes = append(x.Attributes, a)
	}
	n = take[int32](s)
	if n < 0 {
		s.bad = true
	}
	for i := int32(0); i < n && !s.bad; i++ {
		x.Listeners = append(x.Listeners, s.next())
	}
	return x
}

func (s *sink) session(x *Session) {
	s.value(x.Created)
	s.value(x.Accessed)
	s.value(x.MaxInactive)
	s.value(x.New)
	s.value(x.Valid)
	s.value(x.ThisAccessed)
	s.value(x.Version)
	s.flag(x.HasPrincipal)
	if x.HasPrincipal {
		s.value(x.Principal)
	}
	s.value(text(x.ID))
	if !x.NoNotes {
		s.value(x.IDNote)
		s.value(x.SavedRequest)
	}
	s.value(int32(len(x.Attributes)))
	for _, a := range x.Attributes {
		s.value(a.Name)
		s.value(a.Value)
	}
	s.value(int32(len(x.Listeners)))
	for _, v := range x.Listeners {
		s.value(v)
	}
}

// DecodeSession reads a stream that is the state of one session.
func DecodeSession(b []byte, l Limits) (*Session, error) {
	s, err := openStream(b, l)
	if err != nil {
		return nil, err
	}
	x := s.session()
	if err := s.end(len(b)); err != nil {
		return nil, err
	}
	return &x, nil
}

// EncodeSession writes the state of one session.
func (d *Dialect) EncodeSession(x *Session) ([]byte, error) {
	var s sink
	s.session(x)
	return s.format(d)
}

// DecodeSessions reads the payload of a SessionAllData.
func DecodeSessions(b []byte, l Limits) ([]Session, error) {
	s, err := openStream(b, l)
	if err != nil {
		return nil, err
	}
	n := take[int32](s)
	if n < 0 {
		s.bad = true
	}
	var all []Session
	for i := int32(0); i < n && !s.bad; i++ {
		all = append(all, s.session())
	}
	if err := s.end(len(b)); err != nil {
		return nil, err
	}
	return all, nil
}

// EncodeSessions writes the payload of a SessionAllData.
func (d *Dialect) EncodeSessions(all []Session) ([]byte, error) {
	var s sink
	s.value(int32(len(all)))
	for i := range all {
		s.session(&all[i])
	}
	return s.format(d)
}

// DecodeUTF reads the payload of a SessionChangeID: the new id.
func DecodeUTF(b []byte, l Limits) (string, error) {
	s, err := openStream(b, l)
	if err != nil {
		return "", err
	}
	t := s.utf()
	return t, s.end(len(b))
}

// EncodeUTF writes the payload of a SessionChangeID.
func EncodeUTF(t string) ([]byte, error) {
	var s sink
	s.utf(t)
	return s.format(nil)
}
