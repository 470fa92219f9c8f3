package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/gorilla/websocket"
)

// counted is a connection that counts the writes that reach it.
type counted struct {
	net.Conn
	writes *atomic.Int32
}

func (c counted) Write(bytes []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(bytes)
}

// listening counts the writes on all connections that it accepts.
type listening struct {
	net.Listener
	writes *atomic.Int32
}

func (l listening) Accept() (net.Conn, error) {
	connection, err := l.Listener.Accept()
	return counted{connection, l.writes}, err
}

// received queues messages for one client, has them sent, and returns what arrives and how many writes that took.
func received(t *testing.T, joined bool, messages []string) ([]string, int32) {
	var upgrader websocket.Upgrader
	var writes atomic.Int32
	sent := make(chan error, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		connection, err := upgrader.Upgrade(hijacker{w, joined}, r, nil)
		if err != nil {
			sent <- err
			return
		}
		defer connection.Close()
		writes.Store(0)
		c := &client{connection: connection, queue: make(chan []byte, len(messages))}
		c.joiner, _ = connection.NetConn().(*joiner)
		for _, message := range messages {
			c.queue <- []byte(message)
		}
		for len(c.queue) > 0 && err == nil {
			err = c.send(<-c.queue)
		}
		sent <- err
	}))
	server.Listener = listening{server.Listener, &writes}
	server.Start()
	defer server.Close()
	peer, _, err := websocket.DefaultDialer.Dial(strings.Replace(server.URL, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	var texts []string
	for range messages {
		_, text, err := peer.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(text))
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	return texts, writes.Load()
}

func TestMessagesThatWaitTogetherAreWrittenTogetherEachInAFrameOfItsOwn(t *testing.T) {
	messages := []string{"one", strings.Repeat("two", 5000), "three"}
	texts, writes := received(t, true, messages)
	if !slices.Equal(texts, messages) || writes != 1 {
		t.Errorf("%d writes brought %q", writes, texts)
	}
}

func TestAHubThatDoesNotJoinWritesEachMessageByItself(t *testing.T) {
	messages := []string{"one", "two", "three"}
	texts, writes := received(t, false, messages)
	if !slices.Equal(texts, messages) || writes != 3 {
		t.Errorf("%d writes brought %q", writes, texts)
	}
}
