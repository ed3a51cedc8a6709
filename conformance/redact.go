package conformance

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
)

// hidden stands for a secret in a report.
const hidden = "***"

// secretWords in the name of a value make it a secret, whoever wrote it.
var secretWords = []string{"secret", "password", "passwd", "token", "private_key", "privatekey", "credential"}

func isSecretName(name string) bool {
	name = strings.ToLower(name)
	return name == "key" || slices.ContainsFunc(secretWords, func(w string) bool { return strings.Contains(name, w) })
}

// redact takes values with the name of a secret out of a JSON document. Schemas
// keep their structure: only text, numbers and lists are hidden.
func redact(doc json.RawMessage) json.RawMessage {
	if len(doc) == 0 {
		return nil
	}
	var v any
	if json.Unmarshal(doc, &v) != nil {
		return nil
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if enc.Encode(hide(v)) != nil {
		return nil
	}
	return bytes.TrimSpace(b.Bytes())
}

func hide(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for name, x := range v {
			if _, object := x.(map[string]any); isSecretName(name) && !object && x != nil && x != "" {
				v[name] = hidden
				continue
			}
			v[name] = hide(x)
		}
	case []any:
		for i := range v {
			v[i] = hide(v[i])
		}
	}
	return v
}

// configJSON describes a configuration struct for a report: its fields by their
// YAML names, those tagged secret:"true" hidden.
func configJSON(cfg any) json.RawMessage {
	v := reflect.ValueOf(cfg)
	for v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct {
		return nil
	}
	fields := map[string]any{}
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if !f.IsExported() {
			continue
		}
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name == "" {
			name = strings.ToLower(f.Name)
		}
		if name == "-" {
			continue
		}
		value := v.Field(i)
		if _, tagged := f.Tag.Lookup("secret"); tagged && !value.IsZero() {
			fields[name] = hidden
		} else if b, err := json.Marshal(value.Interface()); err == nil {
			fields[name] = json.RawMessage(b)
		}
	}
	doc, err := json.Marshal(fields)
	if err != nil {
		return nil
	}
	return doc
}
